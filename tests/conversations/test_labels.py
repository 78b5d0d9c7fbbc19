"""conversations/labels.py: which tokens are labels."""

import itertools

import pytest
from chats import CHAT, GENERATION, SYSTEM_CHAT, TURNS, chat
from conftest import make_tokenizer
from tokenizers.processors import TemplateProcessing

from conversations.batches import Collator
from conversations.labels import encode
from conversations.targets import IGNORE

# Qwen3 writes an empty think block, but only in front of the answer to the last question.
THINKS_LAST = TURNS.replace("CONTENT", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")


def make_bos_tokenizer(style, template="file"):
    """Adds BOS to every text by itself, as LLaMA's, Mistral's and Gemma's do: a second BOS would show."""
    tokenizer = make_tokenizer(style, template)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def runs(out, tokenizer) -> list:
    """In their order: tokens that are no labels as one text, tokens that are as a list of token strings."""
    pairs, found = list(zip(out["input_ids"], out["labels"], strict=True)), []
    assert all(label in (IGNORE, token) for token, label in pairs)
    for is_label, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        found.append(tokenizer.convert_ids_to_tokens(ids) if is_label else tokenizer.decode(ids))
    return found


GOLDEN = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ncold moon<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwarm<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["w", "a", "rm", "<|eot_id|>"],
        "<|start_header_id|>user<|end_header_id|>\n\nstone<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["s", "tone", "<|eot_id|>"],
    ],
    "chatml": [
        "<|im_start|>system\ncold moon<|im_end|>\n<|im_start|>user\nwarm<|im_end|>\n<|im_start|>assistant\n",
        ["Ġwarm", "Ġ", "Ċ", "<|im_end|>"],  # the only one of the four that keeps the white space
        "\n<|im_start|>user\nstone<|im_end|>\n<|im_start|>assistant\n",
        ["s", "tone", "<|im_end|>"],
        "\n",
    ],
    "mistral": ["<s>[INST] cold moon\n\nwarm [/INST]", ["Ġwarm", "</s>"], "[INST] stone [/INST]", ["Ġstone", "</s>"]],
    "gemma": [
        "<bos><start_of_turn>user\nwarm<end_of_turn>\n<start_of_turn>model\n",
        ["w", "a", "rm", "<end_of_turn>"],
        "\n<start_of_turn>user\nstone<end_of_turn>\n<start_of_turn>model\n",
        ["s", "tone", "<end_of_turn>"],
        "\n",
    ],
}


@pytest.mark.parametrize("style", GOLDEN)
def test_only_answers_and_their_ends_are_labels(style):
    tokenizer, messages = make_bos_tokenizer(style), CHAT if style == "gemma" else SYSTEM_CHAT
    assert runs(encode(messages, tokenizer, 1000), tokenizer) == GOLDEN[style]


@pytest.mark.parametrize("style", GOLDEN)
def test_without_a_system_turn_the_labels_are_the_same(style):
    tokenizer = make_bos_tokenizer(style)
    start, *rest = runs(encode(CHAT, tokenizer, 1000), tokenizer)
    assert rest == GOLDEN[style][1:] and "cold moon" not in start


@pytest.mark.parametrize("style", GOLDEN)
def test_tokens_are_the_templates_text_with_its_one_bos(style):
    tokenizer = make_bos_tokenizer(style)
    ids = encode(CHAT, tokenizer, 1000)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    if style != "chatml":  # ChatML has no BOS; this tokenizer's is the start of every turn
        assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_generation_template_gives_the_same_labels():
    marked = make_bos_tokenizer("chatml", GENERATION)
    assert encode(SYSTEM_CHAT, marked, 1000) == encode(SYSTEM_CHAT, make_bos_tokenizer("chatml"), 1000)


def test_generation_template_may_rewrite_answers():
    """It says itself what the assistant's tokens are, so no answer has to be found again."""
    tokenizer = make_tokenizer("chatml", GENERATION.replace("%}{{ m.content }}", "%}{{ m.content | upper }}", 1))
    labels = runs(encode(chat("why", "i b"), tokenizer, 1000), tokenizer)[1::2]
    assert labels == [["I", "Ġ", "B", "<|im_end|>"]]


def test_template_that_writes_the_last_answer_differently():
    tokenizer = make_tokenizer("chatml", THINKS_LAST)
    before, first, between, second, end = GOLDEN["chatml"]
    golden = [before, first, between + "<think>\n\n</think>\n\n", second, end]
    assert runs(encode(SYSTEM_CHAT, tokenizer, 1000), tokenizer) == golden


def test_end_of_turn_stays_a_label_where_it_is_the_pad_token():
    tokenizer = make_tokenizer("llama3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [encode(CHAT, tokenizer, 1000), encode(chat("why", "cold"), tokenizer, 1000)]
    labels = Collator(tokenizer.pad_token_id)(rows)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [2, 1]  # the answers' ends, none of the padding


def without_end(golden: list) -> list:
    """What is left of GOLDEN if the last answer is unfinished: nothing from its end-of-turn token on."""
    return [*golden[:3], golden[3][:-1]]


@pytest.mark.parametrize("style", GOLDEN)
def test_an_unfinished_answer_has_no_end(style):
    tokenizer, messages = make_bos_tokenizer(style), CHAT if style == "gemma" else SYSTEM_CHAT
    assert runs(encode(messages, tokenizer, 1000, unfinished=True), tokenizer) == without_end(GOLDEN[style])


def test_an_unfinished_answer_in_a_generation_template():
    """Whether the template counts the end of turn as the assistant's or not."""
    counts = make_bos_tokenizer("chatml", GENERATION)
    without = make_bos_tokenizer(
        "chatml", GENERATION.replace("<|im_end|>{% endgeneration %}\n", "{% endgeneration %}<|im_end|>")
    )
    start, first, between, second = without_end(GOLDEN["chatml"])
    assert runs(encode(SYSTEM_CHAT, counts, 1000, True), counts) == [start, first, between, second]
    golden = [start, first[:-1], "<|im_end|>" + between, second]
    assert runs(encode(SYSTEM_CHAT, without, 1000, True), without) == golden


@pytest.mark.parametrize("template", ["file", THINKS_LAST, GENERATION], ids=["spans", "thinks", "generation"])
@pytest.mark.parametrize("answer", ["cold", "cold ", "cold\n\n"])
def test_white_space_at_an_unfinished_end_is_left_out(answer, template):
    tokenizer = make_tokenizer("chatml", template)
    assert runs(encode(chat("why", answer), tokenizer, 1000, unfinished=True), tokenizer)[1:] == [["cold"]]


def test_a_token_that_reaches_beyond_an_unfinished_answer_is_left_out():
    tokenizer = make_tokenizer("chatml", TURNS.replace("CONTENT", "{{ m.content }}ater"))
    labels = [runs(encode(chat("why", "cold w"), tokenizer, 1000, flag), tokenizer)[1] for flag in (False, True)]
    assert labels == [["cold", "Ġwater", "<|im_end|>"], ["cold"]]


@pytest.mark.parametrize("template", ["file", GENERATION], ids=["spans", "generation"])
@pytest.mark.parametrize("max_length", [3, 21, 1000])  # 21: in the middle of the first answer
@pytest.mark.parametrize("unfinished", [False, True])
def test_truncation_keeps_the_start(unfinished, template, max_length):
    tokenizer = make_tokenizer("chatml", template)
    whole, cut = (encode(CHAT, tokenizer, length, unfinished) for length in (10**6, max_length))
    assert cut == {key: tokens[:max_length] for key, tokens in whole.items()}


def test_an_eos_behind_the_whole_text_is_no_end_of_turn():
    tokenizer = make_tokenizer("chatml", TURNS.replace("CONTENT", "{{ m.content }}") + "{{ eos_token }}")
    labelled = runs(encode(chat("why", "cold", "why", "cold"), tokenizer, 1000), tokenizer)[1::2]
    assert labelled == [["cold", "<|im_end|>"]] * 2
