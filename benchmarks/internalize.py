"""What it takes to make a document an adapter of the starter, from the text to its row of the router.

python -m benchmarks.internalize    # 2,000 tokens of filler with a number in it, five times
"""

import resource
import time

from molora import MoLoRAModel
from molora.starter import starter_folder
from molora_training.hypernet.lessons import Needles

TOKENS, ROUNDS = 2000, 5


def main() -> None:
    model = MoLoRAModel.from_pretrained(starter_folder())
    (lesson,) = Needles(count=1).of_length(TOKENS * 9 // 8)  # its own count is of words, about
    tokens = len(model.tokenizer(lesson.text)["input_ids"])
    print(f"{tokens} tokens; {_most_mib():,.0f} MiB at most so far", flush=True)
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        model.internalize(lesson.text)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{wall:.2f} s, {cpu:.2f} s of the processor, {_most_mib():,.0f} MiB at most so far", flush=True)
        model.reset()


def _most_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
