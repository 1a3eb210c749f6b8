"""llama.cpp through llama-cpp-python's C interface: one context, one sequence for each prompt, greedy sampler."""

import time

import llama_cpp as llama
from lines import serve, versions


def load(request):
    """Model and context; the best of flash attention on and off is chosen by a short trial."""
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(request["gguf"].encode(), params)
    if not model:
        raise RuntimeError(f"cannot load {request['gguf']}")
    trials = {flash: Engine(model, request, flash) for flash in (0, 1)}
    prompt = [list(range(10, 42))]
    times = {}
    for flash, engine in trials.items():
        engine.generate(prompt, 8)
        _, first, seconds = engine.generate(prompt, 48)
        times[flash] = seconds - first
    best = min(times, key=times.get)
    llama.llama_free(trials.pop(1 - best).context)
    settings = {
        "flash_attention": bool(best), "threads": request["threads"], "kv": "float16",
        "system": llama.llama_print_system_info().decode(), "versions": versions("llama_cpp_python", "numpy"),
    }  # fmt: skip
    return trials[best].generate, settings


class Engine:
    """One context. ``kv`` of llama.cpp's default type, float16."""

    def __init__(self, model, request, flash):
        params = llama.llama_context_default_params()
        params.n_seq_max = request["batch"]
        params.n_ctx = request["context"] * request["batch"]
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = request["threads"]
        params.flash_attn_type = flash
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("no context")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(2048, 0, 1)
        self.sampler = llama.llama_sampler_init_greedy()

    def generate(self, prompts, max_tokens):
        """Exactly ``max_tokens`` greedy tokens of each prompt."""
        llama.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        rows = []
        for sequence, ids in enumerate(prompts):
            rows += [(token, at, sequence, at == len(ids) - 1) for at, token in enumerate(ids)]
        tokens = [[token] for token in self._prompt(rows, len(prompts))]
        first = time.perf_counter() - began
        for step in range(max_tokens - 1):
            both = enumerate(zip(prompts, tokens, strict=True))
            found = self._forward([(own[-1], len(ids) + step, n, True) for n, (ids, own) in both])
            for own, token in zip(tokens, found, strict=True):
                own.append(token)
        return tokens, first, time.perf_counter() - began

    def _prompt(self, rows, count):
        found = [None] * count
        for at in range(0, len(rows), 2048):
            part = rows[at : at + 2048]
            ends = [sequence for _, _, sequence, last in part if last]
            for sequence, token in zip(ends, self._forward(part), strict=True):
                found[sequence] = token
        return found

    def _forward(self, rows):
        """One llama_decode; the greedy tokens of the rows that ask for logits."""
        batch, asked = self.batch, []
        batch.n_tokens = len(rows)
        for n, (token, position, sequence, logits) in enumerate(rows):
            batch.token[n], batch.pos[n] = token, position
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = logits
            if logits:
                asked.append(n)
        if status := llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [llama.llama_sampler_sample(self.sampler, self.context, n) for n in asked]


if __name__ == "__main__":
    serve(load)
