"""The byte-level BPE tokenizer of the embedded model: trained on the train split, at most 2048 entries.

Every byte is an entry, so any UTF-8 text survives a round trip; every digit is a token of its own, so that
sums are about digits and not about the numbers that happened to be frequent.
"""

from __future__ import annotations

from itertools import islice

from generate import exercises, stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 2048
DOCUMENTS = 20_000


def train_tokenizer(seed: int, max_length: int) -> PreTrainedTokenizerFast:
    """BPE over `DOCUMENTS` stories and as many exercises of the train split; the seed decides every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(islice(stories("train", seed), DOCUMENTS))
    texts += [exercise.text for exercise in islice(exercises("train", seed), DOCUMENTS)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
