"""The command line of a report, without secrets."""

from __future__ import annotations

import pytest

from hallo_numguard.core.run_description import command_line, new_run_id


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train.py --lr 0.1 --tokenizer gpt2 --max_tokens 5", "train.py --lr 0.1 --tokenizer gpt2 --max_tokens 5"),
        ("train.py --api-key abc --lr 1", "train.py --api-key *** --lr 1"),
        ("train.py --hf_token=abc", "train.py --hf_token=***"),
        ("train.py wandb.apiKey=abc +logger.api_key=abc", "train.py wandb.apiKey=*** +logger.api_key=***"),
        ("train.py WANDB_API_KEY=abc", "train.py WANDB_API_KEY=***"),
        ("train.py --password --fast", "train.py --password --fast"),
        ("train.py hf_abcdefghijklmnopqrst", "train.py ***"),
        (f"train.py --key-file a --wandb {'0a' * 20}", "train.py --key-file *** --wandb ***"),
        ("train.py https://me:secret@host/data", "train.py https://***@host/data"),
        ("train.py --note a\x1b[2J", "train.py --note a\ufffd[2J"),
    ],
)
def test_secrets_are_left_out_of_the_command(words, shown):
    assert command_line(words.split(" ")) == shown


def test_runs_have_names_of_their_own():
    assert new_run_id() != new_run_id()
