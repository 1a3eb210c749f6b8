"""transformers' generate: SDPA attention, KV cache, left padding in a batch; mode ``lookup``: its prompt lookup."""

import time

import torch
from lines import serve, versions
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

LOOKUP = 10  # tokens of a draft, the documentation's own figure


class Clock(LogitsProcessor):
    """When the first scores were there."""

    def __init__(self):
        self.first = None

    def __call__(self, ids, scores):
        """Changes nothing."""
        self.first = self.first or time.perf_counter()
        return scores


def load(request):
    """The model in bfloat16."""
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()
    more = {"prompt_lookup_num_tokens": LOOKUP} if request["mode"] == "lookup" else {}

    def generate(prompts, max_tokens):
        longest = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        clock, began = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=max_tokens, max_new_tokens=max_tokens,
                use_cache=True, pad_token_id=0, logits_processor=LogitsProcessorList([clock]), **more,
            )  # fmt: skip
        ended = time.perf_counter()
        return out[:, longest : longest + max_tokens].tolist(), clock.first - began, ended - began

    generate([list(range(5, 20))], 4)
    settings = {"attention": "sdpa", "threads": request["threads"], **more}
    return generate, {**settings, "versions": versions("transformers", "torch")}


if __name__ == "__main__":
    serve(load)
