"""Private training: what is sampled, clipped and added, and the ε that is reported for it."""

import dataclasses
import json

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcnn
from experiments import checkpoints, private, train
from experiments.private import PADDING, Mechanism, PrivacyOptions
from tests.experiments.test_resume import interrupt, main, options, results, write_images  # noqa: F401, a fixture

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels
NET = jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(4))
OF = Mechanism(count=60, size=20, capacity=24, noise_multiplier=0.5, delta=1e-3)
BOUND = 0.3


def batch(drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 24 examples: `drawn` ones, then padding."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((24, 50, 40, 1)).astype(np.float32), np.arange(24, dtype=np.int32) % 4
    x[drawn:], labels[drawn:] = 0, PADDING
    return x, labels


def test_the_gradient_is_the_clipped_sum_and_noise_over_the_mean_size():
    """Padding has no influence. 8,004 numbers have noise of mean 0 and the right deviation, other in each step."""
    params = NET.init(jax.random.key(1), (50, 40, 1))
    x, labels = batch(18)
    expected = jax.tree.map(jnp.zeros_like, params)
    each = jax.jit(jax.grad(lambda params, x, label: LOSS(NET.apply(params, x[None]), label[None])[0]))
    for image, label in zip(x[:18], labels[:18], strict=True):
        g = each(params, image, label)
        assert optax.tree.norm(g) > BOUND  # clipped
        expected = optax.tree.add(expected, optax.tree.scale(BOUND / optax.tree.norm(g), g))

    @jax.jit
    def gradient(key):
        return private.noisy_gradient(BOUND, OF)(NET, private.masked(LOSS), params, x, labels, key=key)

    noise = []
    for key in jax.random.split(jax.random.key(2), 2):
        rest = jax.tree.map(lambda a, b: 20 * np.asarray(a, float) - np.asarray(b, float), gradient(key), expected)
        noise.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rest)]))
        assert len(noise[-1]) == 8004
        assert noise[-1].std() == pytest.approx(0.5 * BOUND, rel=0.04)  # 5 standard errors
        assert abs(noise[-1].mean()) < 5 * 0.5 * BOUND / 8004**0.5
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.06
    without = dataclasses.replace(OF, noise_multiplier=1e-9)
    exact = private.noisy_gradient(BOUND, without)(NET, private.masked(LOSS), params, x, labels, key=key)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(20 * a, b, rtol=1e-5, atol=1e-6)


def test_metrics_are_those_of_the_drawn_examples():
    step = private.make_step(NET, LOSS, optax.sgd(0.0), BOUND, OF)
    state = jaxcnn.TrainState.create(NET, optax.sgd(0.0), jax.random.key(0), (50, 40, 1))
    for drawn in (18, 0):
        x, labels = batch(drawn)
        expected = {"loss": 0.0, "accuracy": 0.0}
        if drawn:
            expected = jaxcnn.evaluate(NET, LOSS, state.params, [(x[:drawn], labels[:drawn])])
        state, metrics = step(state, (x, labels))
        assert jax.tree.map(float, metrics) == pytest.approx(expected, rel=1e-5)


def test_samples():
    """Each image is drawn with probability q, independently; of a larger sample, a random subset is used."""
    images, labels = np.ones((60, 2, 2, 1), np.float32), np.arange(60, dtype=np.int32)
    chosen = np.arange(60)[::-1]

    def batches(part=slice(None), of=OF, key=0):
        result = private.PoissonBatches(images, labels, chosen, of, part)
        result.draw_from(jax.random.key(key))
        return result

    counts, sizes = np.zeros(60), []
    whole, large = batches(), batches(of=dataclasses.replace(OF, capacity=60))
    for step in range(3000):
        sample = large.sample(step)
        assert len(set(sample)) == len(sample)
        counts[sample] += 1
        sizes.append(len(sample))
        np.testing.assert_array_equal(whole.sample(step), sample[:24])
    assert np.abs(counts - 1000).max() < 5 * (3000 / 3 * 2 / 3) ** 0.5
    assert np.var(sizes) == pytest.approx(60 / 3 * 2 / 3, rel=0.13)  # 5 standard errors
    assert whole.per_epoch == 3

    drawn, targets = whole(7)
    count = len(whole.sample(7))
    assert (targets[:count] == chosen[whole.sample(7)]).all()
    assert (targets[count:] == PADDING).all()
    assert len(targets) == 24
    assert (drawn.sum((1, 2, 3)) == np.where(targets == PADDING, 0, 4)).all()
    assert (batches(slice(12, 24))(7)[1] == targets[12:]).all()
    assert not np.array_equal(batches(key=1)(7)[1], targets)


@pytest.mark.slow("computes many accounts")
def test_epsilon_is_the_accountants():
    """For a sample that is never truncated, ε is that of Poisson sampling; a truncated one has a larger ε."""
    event = dp_accounting.PoissonSampledDpEvent(1 / 3, dp_accounting.GaussianDpEvent(2.0))
    poisson = dp_accounting.pld.PLDAccountant().compose(event, 10).get_epsilon(1e-3)
    whole = Mechanism(60, 20, 60, 2.0, 1e-3)
    assert poisson <= whole.epsilon(10) == pytest.approx(poisson, rel=5e-3)
    assert whole.epsilon(10) < dp_accounting.rdp.RdpAccountant().compose(event, 10).get_epsilon(1e-3)
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(60, 1 / 3, 24, 2.0)
    truncated = dp_accounting.pld.PLDAccountant().compose(event, 10).get_epsilon(1e-3)
    assert truncated <= dataclasses.replace(whole, capacity=24).epsilon(10) == pytest.approx(truncated, rel=5e-3)
    assert truncated > poisson * 1.01
    assert whole.epsilon(0) == 0
    # Abadi et al. 2016, §3.2, have 1.26 from moments for q = 0.01, σ = 4, 10,000 steps. This accountant is tighter.
    assert 0.9 < Mechanism(60_000, 600, 2000, 4.0, 1e-5).epsilon(10_000) < 1.26
    records = [{"step": n} for n in (3, 4, 6)]
    logged = whole.logged(records, 4, 6)
    assert logged == [{"step": 3}, {"step": 4, "epsilon": whole.epsilon(4)}, {"step": 6, "epsilon": whole.epsilon(6)}]


def test_the_mechanism_of_a_training():
    assert private.mechanism(PrivacyOptions(), 20, 1000, 1) is None
    assert private.mechanism(PrivacyOptions(private=True), 20, 1000, 4) == Mechanism(1000, 20, 44, 1.0, 1000**-1.1)
    given = PrivacyOptions(private=True, noise_multiplier=2.0, delta=1e-4)
    assert private.mechanism(given, 20, 30, 4) == Mechanism(30, 20, 32, 2.0, 1e-4)


PRIVATE = ("--private", "--clip-norm", 0.5, "--noise-multiplier", 0.7)


@pytest.mark.slow("trains and resumes")
def test_a_resumed_private_run_is_an_undisturbed_one(tmp_path, interrupt, monkeypatch, capsys):  # noqa: F811
    """The secret key comes from the checkpoint; two devices give the same numbers up to rounding."""
    images = write_images(tmp_path / "images")
    argv = (*options(images), *PRIVATE, "--batch-size", 8, "--epochs", 1, "--save-every", 3)
    keys = iter([jax.random.key(5), jax.random.key(5), jax.random.key(6), jax.random.key(5)])
    monkeypatch.setattr(private, "secret_key", lambda: next(keys))
    assert main(*argv, "--out", tmp_path / "whole") == 0
    taken = private.PoissonBatches.__call__

    def stop(self, step):
        if step == 5:
            monkeypatch.setattr(private.PoissonBatches, "__call__", taken)
            raise KeyboardInterrupt
        return taken(self, step)

    monkeypatch.setattr(private.PoissonBatches, "__call__", stop)
    assert main(*argv, "--out", tmp_path / "cut") == 130
    assert main("--resume", tmp_path / "cut") == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")

    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    shared = json.loads(checkpoints.metadata(tmp_path / "whole" / "weights.safetensors")["config"])
    assert {*config} - {*shared} == {
        "data_sha256",
        "end",
        "steps",
        "best_step",
        "test_loss",
        "test_accuracy",
        "privacy",
    }
    of = Mechanism(72, 8, 8 + 15, 0.7, 72**-1.1)
    assert config["privacy"] == of.as_json(9)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines[:-1]] == [{"step", "loss", "accuracy"}] * 8
    assert lines[-1]["epsilon"] == of.epsilon(9)
    assert f"\n{of.describe(9)}\n" in capsys.readouterr().out

    assert main(*argv, "--out", tmp_path / "devices", "--devices", 2) == 0
    both = [json.loads(line) for line in (tmp_path / "devices" / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(lines, both, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_secret_keys_differ():
    assert (jax.random.key_data(private.secret_key()) != jax.random.key_data(private.secret_key())).any()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--noise-multiplier", 1), "--noise-multiplier: must be omitted without --private, got 1.0"),
        (("--delta", 0.1), "--delta: must be omitted without --private, got 0.1"),
        (("--private",), "--clip-norm: must be a finite number > 0 with --private, got 0.0"),
        ((*PRIVATE, "--microbatch", 8), "--microbatch: must be omitted with --private, got 8"),
        ((*PRIVATE, "--noise-multiplier", 0), "--noise-multiplier: must be a finite number > 0, got 0.0"),
        ((*PRIVATE, "--noise-multiplier", "nan"), "--noise-multiplier: must be a finite number > 0, got nan"),
        ((*PRIVATE, "--delta", 1), "--delta: must be between 0 and 1, got 1.0"),
        (
            (*PRIVATE, "--augment", "flip", "mixup"),
            "--augment: must be without mixup, which combines images, with --private, got flip mixup",
        ),
        (
            (*PRIVATE, "--dtype", "bfloat16"),
            "--dtype: must be float32 with --private, whose bound is not exact otherwise, got bfloat16",
        ),
        (
            (*PRIVATE, "--model", "small"),
            "--model: must be a net without batch norm, whose statistics combine images, with --private, got small "
            "with batch_norm1",
        ),
        (
            (*PRIVATE, "--model", "tests.other_nets:Linen"),
            "--model: must be a net without batch norm, whose statistics combine images, with --private, got "
            "tests.other_nets:Linen with batch_stats",
        ),
    ],
)
def test_refused(argv, message, capsys):
    assert train.main([str(arg) for arg in argv]) == 2
    assert capsys.readouterr().err == f"{train.PROG}: {message}\n"
