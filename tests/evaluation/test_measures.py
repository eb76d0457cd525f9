"""FID, KID, precision, recall and CLIP scores, where the answer is known."""

import numpy as np
import pytest
import scipy.linalg

from sd3_jax.errors import UserError
from sd3_jax.evaluation import clip_score, extractors, feature_statistics, fid
from sd3_jax.evaluation.feature_statistics import About, Stored
from sd3_jax.evaluation.kid import kid, mmd
from sd3_jax.evaluation.precision_recall import precision_recall


def features(seed, n, d, shift=0.0, rank=None):
    """Correlated, of a large mean, in float32 as extractors give them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or d, d)) / np.sqrt(d)
    x = rng.normal(size=(n, rank or d)) @ mixing + shift + 3
    return x.astype(np.float32)


def by_scipy(a, b):
    """As pytorch-fid does it, in float64."""
    m1, m2, s1, s2 = a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)


def by_eigenvalues(a, b):
    """As torch-fidelity does it."""
    m1, m2, s1, s2 = a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real
    return np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum()


@pytest.mark.parametrize("n, rank", [(200, None), (20, None), (200, 5)])
def test_fid_is_theirs_also_of_fewer_pictures_than_numbers(n, rank):
    a, b = features(0, n, 48, rank=rank), features(1, 300, 48, 0.1)
    found = fid.frechet(feature_statistics.of(a), feature_statistics.of(b))
    wide = a.astype(np.float64), b.astype(np.float64)
    assert found == pytest.approx(by_eigenvalues(*wide), rel=1e-4)
    if n > 48 and rank is None:
        assert found == pytest.approx(by_scipy(*wide), rel=1e-6)
    both = fid.frechet(feature_statistics.of(b), feature_statistics.of(a))
    assert both == pytest.approx(found, rel=1e-9)


def test_fid_of_gaussians_whose_distance_is_known():
    """Of diagonal covariances, |m1 - m2|^2 + sum (s1 - s2)^2; also with zeros."""
    s1, s2 = np.array([1.0, 4.0, 0.0, 0.0]), np.array([9.0, 1.0, 2.0, 0.0])
    gauss = lambda m, s: feature_statistics.Statistics(
        11, np.full(4, m), 10 * np.diag(s)
    )
    found = fid.frechet(gauss(0.5, s1), gauss(1.0, s2))
    wanted = 4 * 0.25 + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    assert found == pytest.approx(wanted, rel=1e-12)
    x = feature_statistics.of(features(0, 20, 48))
    assert fid.frechet(x, x) < 1e-10


def test_fid_wants_pictures_and_one_extractor():
    x = features(0, 20, 4)
    with pytest.raises(UserError, match="1 features; at least 2"):
        fid.frechet(feature_statistics.of(x[:1]), feature_statistics.of(x))
    with pytest.raises(UserError, match="one extractor"):
        fid.frechet(feature_statistics.of(x), feature_statistics.of(x[:, :3]))


def test_parts_merged_are_the_whole():
    """Also where the mean is a million deviations away; a part may be empty."""
    x = np.random.default_rng(0).normal(size=(1_000, 6)) + 1e6
    cuts = (0, 1, 1, 300, 1_000)
    parts = [feature_statistics.of(x[a:b]) for a, b in zip(cuts, cuts[1:])]
    found, wanted = feature_statistics.summed(parts), feature_statistics.of(x)
    assert found.count == 1_000
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.scatter, wanted.scatter, atol=1e-6)
    np.testing.assert_allclose(wanted.covariance, np.cov(x.T), atol=1e-9)


def test_kid_is_the_estimator_of_its_definition():
    a, b = features(0, 9, 5).astype(float), features(1, 7, 5).astype(float)
    k = lambda x, y: (np.dot(x, y) / 5 + 1) ** 3
    within = lambda x: np.mean([k(p, q) for p in x for q in x if p is not q])
    a, b = list(a), list(b)
    wanted = within(a) + within(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    assert mmd(np.array(a), np.array(b)) == pytest.approx(wanted, rel=1e-9)


def test_kid_is_unbiased():
    """Subsets of one distribution are 0 apart on average, below it as often."""
    x = np.random.default_rng(0).normal(size=(4_000, 8))
    same = kid(x[:2_000], x[2_000:], size=50)
    assert abs(same.mean) < 4 * same.std / np.sqrt(same.size)
    far = kid(x[:2_000], x[2_000:] + 0.5, size=50)
    assert far.mean > 10 * abs(same.mean) and far.size == 50
    assert kid(x, x[:50]) == kid(x, x[:50])  # its draws are its own
    with pytest.raises(UserError, match="KID of 1 and 2"):
        kid(x[:1], x[:2])


def test_precision_and_recall_where_they_are_known():
    rng = np.random.default_rng(0)
    modes = lambda at, n: rng.normal(size=(n, 4)) + 100 * np.array(at)[:, None]
    left, right = modes([0] * 300, 300), modes([1] * 300, 300)
    both = np.concatenate([left, right])
    one = precision_recall(both, modes([0] * 300, 300))  # half of the modes, well
    assert one.precision > 0.9 and 0.4 < one.recall <= 0.5
    more = precision_recall(left, np.concatenate([modes([0] * 99, 99), right[:99]]))
    assert 0.4 < more.precision <= 0.5 and more.recall > 0.8
    assert precision_recall(left, right) == (0, 0)
    assert precision_recall(left, left[::-1]) == (1, 1)
    blank = np.full((9, 4), 0.1)
    assert precision_recall(blank, blank) == (1, 1)
    with pytest.raises(UserError, match="more than 3"):
        precision_recall(left, right[:3])


def test_clip_scores_are_cosines():
    images, texts = np.array([[2.0, 0], [0, 3], [1, 1]]), np.array([[1.0, 0]] * 3)
    found = clip_score.cosines(images, -texts)
    np.testing.assert_allclose(found, [-1, 0, -(0.5**0.5)])
    assert clip_score.cosines(0 * images, texts).tolist() == [0, 0, 0]


ABOUT = About("clip", "0123456789ab", 16, 32)


def stored(n=9, d=4):
    x = features(0, n, d)
    return Stored(ABOUT, feature_statistics.of(x), x)


def test_statistics_are_kept_to_the_last_bit(tmp_path):
    feature_statistics.save(tmp_path / "sub" / "real.npz", stored())
    found = feature_statistics.load(tmp_path / "sub" / "real.npz")
    assert found.about == ABOUT and found.statistics.count == 9
    for a, b in zip(found.statistics[1:] + found[2:], stored()[1][1:] + stored()[2:]):
        np.testing.assert_array_equal(a, b)
    feature_statistics.check(found, ABOUT, 4, least=9, where="real.npz")


@pytest.mark.parametrize(
    "about, dim, least, told",
    [
        (ABOUT._replace(extractor="pixels"), 4, 1, "extractor: clip, expected pixels"),
        (
            ABOUT._replace(fingerprint="f"),
            4,
            1,
            "fingerprint: 0123456789ab, expected f",
        ),
        (ABOUT._replace(width=16), 4, 1, "pictures: 16 x 32, expected 16 x 16"),
        (ABOUT, 5, 1, "numbers a feature: 4, expected 5"),
        (ABOUT, 4, 10, "9 pictures, expected 10 or more"),
    ],
)
def test_statistics_of_something_else_are_refused(about, dim, least, told):
    with pytest.raises(UserError, match=f"^real.npz: .*{told}"):
        feature_statistics.check(stored(), about, dim, least=least, where="real.npz")


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="cannot be read"):
        feature_statistics.load(path)
    for write, told in (
        (lambda: path.write_bytes(b"no zip"), "x.npz: .*expected statistics"),
        (lambda: np.savez(path, mu=np.zeros(3)), "mean, scatter"),
        (lambda: np.savez(path, mean=np.array([None])), "Object arrays"),
        (lambda: feature_statistics.save(path, bad()), "not finite"),
    ):
        write()
        with pytest.raises(UserError, match=told):
            feature_statistics.load(path)


def bad():
    one = stored()
    return one._replace(features=one.features * np.nan)


def test_an_extractor_gives_features_or_says_what_it_gave():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), np.uint8)
    found = extractors.PIXELS(images)
    assert found.shape == (3, 12) and found.dtype == np.float32
    assert found.max() <= 1 and found[1, 4] == np.float32(images[1, 0, 1, 1]) / 255
    for gives, told in (
        (
            lambda x: x.mean((1, 2, 3)),
            r"shape \(3,\).*expected float32 of shape \(3, d",
        ),
        (lambda x: x.reshape(3, -1), "returned uint8"),
        (lambda x: x[:2].reshape(2, -1) / 2, r"shape \(2, 12\)"),
        (lambda x: x.reshape(3, -1) / np.zeros(()), "not finite"),
    ):
        with np.errstate(all="ignore"), pytest.raises(UserError, match=told):
            extractors.Extractor("mine:f", "", gives)(images)


def test_inceptions_torchscript_is_called_as_it_is_elsewhere(tmp_path):
    import torch

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False):
            assert x.dtype == torch.uint8
            pooled = x.to(torch.float32).mean([2, 3])
            return pooled if return_features else pooled.softmax(1)

    path = tmp_path / "inception.pt"
    torch.jit.script(Net()).save(str(path))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    extract = extractors.of_torchscript(path)
    assert extract.name == "inception.pt" and len(extract.fingerprint) == 12
    np.testing.assert_allclose(extract(images), images.mean((1, 2)), rtol=1e-6)
    with pytest.raises(UserError, match="cannot be read"):
        extractors.of_torchscript(tmp_path / "none.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(UserError, match="expected Inception's"):
        extractors.of_torchscript(path)(images)
