"""What stands for a question ends where the answer begins."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molora.keys import READS, asked
from molora_training.continual.questions import LAST, MEAN, represented
from molora_training.data import Encoded


def test_a_question_ends_where_the_answer_begins() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=5, **sizes)).eval()
    short, long = (torch.arange(5, 5 + length) for length in (6, 9))
    rows = []
    for ids in (short, long):
        labels = torch.where(torch.arange(len(ids)) >= 4, ids, -100)
        rows.append(Encoded(ids, labels, torch.zeros_like(ids), torch.zeros_like(ids)))
    found = represented(base, rows, 0, 64)
    torch.testing.assert_close(found[0], found[1])  # the same four tokens ask
    with torch.no_grad():
        states = base(short[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0, MEAN], states[READS][0, :4].mean(0))
    torch.testing.assert_close(found[0, LAST], states[READS][0, 3])
    torch.testing.assert_close(found[0, MEAN], asked(base, short[:4]))  # as a model that serves reads it
