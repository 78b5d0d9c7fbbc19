"""decoding/answers.py: many prompts, batch by batch."""

from decoders import PROMPTS, VOCAB, greedy, make_model

from decoding.answers import answer_all


def test_answer_all_is_plain_decoding_batch_by_batch():
    model = make_model(heads=0)
    prompts = [PROMPTS[i % 4] + [i % VOCAB] for i in range(7)]
    want = [greedy(model.backbone, prompt, 20, eos=3) for prompt in prompts]
    assert list(answer_all(model, prompts, 20, 3, {3})) == want
    assert {len(answer) for answer in want} != {20}
    assert list(answer_all(model, [], 20, 3, {3})) == []
