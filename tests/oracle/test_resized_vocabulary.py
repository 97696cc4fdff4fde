"""A base with room for new tokens, beside transformers' `resize_token_embeddings`."""

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from pairs import run_decoder

from jaxlora.checkpoints.fitted import fit, load_base, resized_tables, written_config
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.save import save_model
from jaxlora.core.tree import flatten
from jaxlora.models.parameters import describe
from jaxlora.models.task import task_of

torch = pytest.importorskip("torch")

OLD, NEW = 61, 71
TOKENS = np.random.default_rng(0).integers(3, NEW, (2, 12))
# Untied; tied with a scaled embedding; tied; a head with a bias; tied with a bias.
NAMES = ["llama 2, gqa", "gemma", "gpt-2", "phi-2", "bert"]
SLOW = dict.fromkeys(NAMES[1:-1], pytest.mark.oracle)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in NAMES]
)
def base(request, make_case, tmp_path_factory):
    """Folder, its shape, and the shape with room for more."""
    folder = tmp_path_factory.mktemp("base")
    make_case(CASES[request.param], folder=folder)
    stored, _ = read_model_config(folder)
    return folder, stored, fit(stored, None, NEW)


def hf_model(folder, cfg):
    import transformers

    return getattr(transformers, task_of(cfg).auto_class).from_pretrained(folder).eval()


def hf_tables(model):
    """``(rows, bias or None)`` of embedding and head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    biases = [getattr(module, "bias", None) for module in modules]
    return [
        (module.weight.detach().numpy(), None if bias is None else bias.detach().numpy())
        for module, bias in zip(modules, biases, strict=True)
    ]


def our_tables(leaves):
    embedding = leaves["embed/embedding"]
    head = leaves["lm_head/kernel"].T if "lm_head/kernel" in leaves else embedding
    return [(embedding, None), (head, leaves.get("lm_head/bias"))]


def test_rows_at_the_mean_are_those_of_transformers(base):
    folder, stored, cfg = base
    model = hf_model(folder, cfg)
    torch.manual_seed(0)
    model.resize_token_embeddings(NEW, mean_resizing=True)
    ours = our_tables(resized_tables(folder, stored, cfg, mean_resizing=True))
    for (rows, bias), (wanted, wanted_bias) in zip(ours, hf_tables(model), strict=True):
        np.testing.assert_array_equal(rows[:OLD], wanted[:OLD])
        # Theirs are drawn around the mean with 3.2e-5 (1e-9 of the covariance) of the spread of
        # the old rows, column by column; 5 sigma.
        assert (np.abs(rows[OLD:] - wanted[OLD:]) < 1.6e-4 * rows[:OLD].std(axis=0)).all()
        assert np.ptp(rows[OLD:], axis=0).max() == 0
        assert (bias is None) == (wanted_bias is None)
        if bias is not None:
            np.testing.assert_array_equal(bias[:OLD], wanted_bias[:OLD])
            np.testing.assert_allclose(bias[OLD:], wanted_bias[OLD:], atol=1e-6)  # float32 mean


def test_random_rows_spread_as_those_of_transformers(base):
    folder, stored, cfg = base
    model = hf_model(folder, cfg)
    torch.manual_seed(0)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    ours = our_tables(resized_tables(folder, stored, cfg, mean_resizing=False))
    for (rows, bias), (wanted, wanted_bias) in zip(ours, hf_tables(model), strict=True):
        np.testing.assert_array_equal(rows[:OLD], wanted[:OLD])
        assert rows[OLD:].std() == pytest.approx(wanted[OLD:].std(), rel=0.3)  # 240 numbers
        if bias is not None:
            np.testing.assert_array_equal(bias, wanted_bias)  # zeros
    if cfg.tie_embedding == stored.tie_embedding and not cfg.tie_embedding:
        assert (ours[0][0][OLD:] != ours[1][0][OLD:]).all()


def test_a_larger_model_loads_in_transformers(base, tmp_path):
    folder, stored, cfg = base
    _, raw = read_model_config(folder)
    params = load_base(folder, stored, cfg, dtype=jnp.float32, mean_resizing=False)
    save_model(params, cfg, tmp_path / "m", config=written_config(raw, stored, cfg))
    again, _ = read_model_config(tmp_path / "m")
    assert again == cfg
    for path, leaf in flatten(load_params(tmp_path / "m", cfg, dtype="float32")).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path], err_msg=path)
    with torch.no_grad():
        theirs = hf_model(tmp_path / "m", cfg)(torch.from_numpy(TOKENS)).logits.numpy()
    assert theirs.shape[-1] == NEW
    # float32, 3 layers, logits of standard deviation about 1.
    np.testing.assert_allclose(run_decoder(cfg, params, TOKENS), theirs, atol=2e-5)


def test_tables_of_an_export_are_those_of_the_run(base):
    folder, stored, cfg = base
    run = flatten(load_base(folder, stored, cfg, dtype=jnp.bfloat16))
    for path, table in resized_tables(folder, stored, cfg, mean_resizing=False).items():
        np.testing.assert_array_equal(jnp.asarray(table, run[path].dtype), run[path])
        assert table.shape == describe(cfg)[path].full_shape
