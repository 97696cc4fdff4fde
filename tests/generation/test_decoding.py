import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import lora
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten, replace
from jaxlora.generation import decoding
from jaxlora.generation.decoding import bucket, generate, stream
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.quantize import quantize

PROMPTS = [[5, 9, 2, 40, 11, 3, 7], [1], [8, 8, 30, 2, 59, 60, 4, 17, 22, 35, 6, 41]]
TWELVE = SamplingOptions(max_new_tokens=12)
SAMPLED = SamplingOptions(temperature=1.0, top_k=20, max_new_tokens=12, seed=4)


def recomputed(model, prompt, count):
    """Greedy decoding without a cache or left padding: the whole row again for every token."""

    @jax.jit
    def following(tokens, last):
        # What is right of `last` is not yet written; no query up to there sees it.
        bound = bind(model.transformer, model.params)
        hidden, _ = bound(tokens, jnp.arange(24)[None], jnp.ones_like(tokens))
        return bound.logits(hidden[0, last]).argmax()

    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        ids[0, end] = following(ids, end - 1)
    return ids[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}])
def test_cached_decoding_of_a_padded_batch_equals_recomputation(random_model, changes):
    model = random_model(**changes)
    wanted = [recomputed(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model.transformer, model.params, PROMPTS, TWELVE) == wanted
    assert len({token for answer in wanted for token in answer}) > 6  # not one token for ever


@pytest.mark.parametrize("options", [TWELVE, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_the_batch(random_model, options):
    model = random_model()
    together = generate(model.transformer, model.params, PROMPTS, options)
    apart = generate(model.transformer, model.params, PROMPTS, options, batch_size=2)
    assert apart == together


def test_the_pad_token_does_not_matter(random_model):
    model = random_model()
    answers = [
        generate(model.transformer, model.params, PROMPTS, TWELVE, pad_id=i) for i in (0, 60)
    ]
    assert answers[0] == answers[1]


def test_the_seed_decides_a_sampled_answer(random_model):
    model, same = random_model(), [PROMPTS[0]] * 2
    first, second = generate(model.transformer, model.params, same, SAMPLED)
    assert first != second
    other = SamplingOptions(temperature=1.0, top_k=20, max_new_tokens=12, seed=5)
    assert generate(model.transformer, model.params, same, SAMPLED) == [first, second]
    assert generate(model.transformer, model.params, same, other)[0] != first


def test_every_token_is_drawn_anew(parrot):
    model = parrot({0: 0}, 50)  # says nothing about any other token: all equally likely
    [answer] = generate(model.transformer, model.params, [[7]], SAMPLED)
    assert len(set(answer)) > 6


@pytest.mark.parametrize(
    "options",
    [TWELVE, SAMPLED, SamplingOptions(repetition_penalty=1.5, max_new_tokens=12)],
    ids=["greedy", "sampled", "penalised"],
)
def test_stream_equals_generate(random_model, options):
    model = random_model()
    whole = generate(model.transformer, model.params, PROMPTS, options)[0]
    assert list(stream(model.transformer, model.params, PROMPTS[0], options)) == whole
    ends = whole[7:8]
    cut = whole[: whole.index(ends[0])]
    assert list(stream(model.transformer, model.params, PROMPTS[0], options, ends)) == cut


def test_each_row_stops_before_its_own_end_token(parrot):
    model = parrot({1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 7}, 12)
    prompts, ends = [[1], [9, 5], [9, 9, 2], [7]], (4, 6)
    assert generate(model.transformer, model.params, prompts, TWELVE, ends) == [
        [2, 3],
        [],
        [3],
        [7] * 12,
    ]


def test_an_answer_stops_where_the_context_is_full(parrot):
    model = parrot({1: 1}, 4, max_context=40)
    options = SamplingOptions(max_new_tokens=100)
    prompts = [[1] * 39, [1] * 3]
    assert [len(a) for a in generate(model.transformer, model.params, prompts, options)] == [1, 37]
    assert len(list(stream(model.transformer, model.params, prompts[0], options))) == 1


def test_answers_are_whole_on_every_device(random_model):
    """One process of several cannot read what lies on the devices of another."""
    model, pinned = random_model(), []

    def constrain(x, axes):
        pinned.append((x.shape, axes))
        return x

    transformer = Transformer(model.transformer.cfg, constrain=constrain)
    generate(transformer, model.params, PROMPTS, TWELVE)
    assert pinned[-2:] == [((3, 32), (None, None)), ((3,), (None,))]


def test_no_prompts_give_no_answers(random_model):
    model = random_model()
    assert generate(model.transformer, model.params, [], TWELVE) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "is empty"),
        ([1] * 96, "96 tokens and leaves no room.*context is 96"),
        ([1, 61], "token ids 1 to 61.*vocabulary has 61"),
        ([-1], "token ids -1 to -1"),
    ],
)
def test_a_prompt_the_model_cannot_read_is_refused(random_model, prompt, message):
    model = random_model()
    with pytest.raises(UserError, match=f"^prompt 2: .*{message}"):
        generate(model.transformer, model.params, [[1], prompt], TWELVE)
    with pytest.raises(UserError, match=f"^prompt: .*{message}"):
        stream(model.transformer, model.params, prompt, TWELVE)


def test_lora_on_quantized_leaves_decodes_as_merged(random_model):
    model = random_model()
    specs = describe(model.transformer.cfg)
    leaves = flatten(model.params)
    packed = {}
    for path in (path for path, spec in specs.items() if spec.kind == "linear"):
        layers = [quantize(matrix, "int8") for matrix in np.asarray(leaves[path])]
        packed[path] = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    quantized = replace(model.params, packed)
    modules = {path: specs[path].modules() for path in packed}
    config = lora.LoraConfig(r=4, target_modules=("q_proj", "up_proj"))
    targets = lora.match(modules, config, stacked=modules)
    rng = np.random.default_rng(0)
    adapter = {
        path: {
            "a": rng.normal(size=(2, specs[path].shape[0], 4)).astype(np.float32),
            "b": rng.normal(size=(2, 4, specs[path].shape[1])).astype(np.float32),
        }
        for path in targets
    }
    adapted = lora.apply(quantized, adapter, targets)
    merged = jax.jit(lambda tree, pairs: lora.merge(tree, pairs, targets))(quantized, adapter)
    answers = generate(model.transformer, adapted, PROMPTS, TWELVE)
    assert answers == generate(model.transformer, merged, PROMPTS, TWELVE)
    assert answers != generate(model.transformer, model.params, PROMPTS, TWELVE)


def test_lengths_and_equal_decoders_share_a_compilation(random_model):
    model = random_model(rope_theta=123.0)
    before = decoding._decode_batch._cache_size()
    for length, count, seed in ((1, 1, 0), (7, 12, 1), (32, 30, 2)):
        options = SamplingOptions(temperature=0.7, max_new_tokens=count, seed=seed)
        generate(Transformer(model.transformer.cfg), model.params, [[1] * length], options)
    assert decoding._decode_batch._cache_size() == before + 1


def test_short_and_longer_prompts_of_one_call_share_a_compilation(random_model):
    model = random_model(rope_theta=124.0)
    before = decoding._decode_batch._cache_size()
    prompts = [PROMPTS[0], [1] * 40]
    together = generate(model.transformer, model.params, prompts, TWELVE, batch_size=1)
    assert decoding._decode_batch._cache_size() == before + 1
    assert generate(model.transformer, model.params, prompts[:1], TWELVE) == together[:1]


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert len(set(sizes)) <= 24
    # At most a quarter more than asked, or the 31 of the smallest quantum.
    assert all(n <= size < max(n * 1.25, n + 32) for n, size in enumerate(sizes, 1))
