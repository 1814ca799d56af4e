"""KID, CMMD and FID's limit against other ways to compute them; the networks of newer metrics."""

import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.kid import poly_mmd
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from cat_diffusion.cat_core.evaluation import distances
from cat_diffusion.cat_core.evaluation.distances import TooFew
from cat_diffusion.cat_core.evaluation.extractors import FeatureFile
from cat_diffusion.cat_core.evaluation.feature_cache import FeatureCache
from cat_diffusion.cat_core.evaluation.measure import PictureBatch, background_lpips
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.evaluation.more_networks import DinoV2, Lpips, PictureScore
from cat_diffusion.cat_core.evaluation.results import Sample
from cat_diffusion.cat_core.user_function import FunctionError

CPU = torch.device("cpu")


def file_of(features):
    file = FeatureFile()
    for batch in features.split(45):
        file.append(batch)
    return file


def pairs(count, width, seed, alike=0.8, shift=0.2):
    """Real and made features, row by row alike as a picture and its inpainted one are."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(count, width, generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return real, (alike * real + (1 - alike**2) ** 0.5 * noise) * (1 + shift) + shift


# Distances ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1024])
def test_kid_is_the_unbiased_one_of_all_pictures(monkeypatch, block):
    monkeypatch.setattr(distances, "BLOCK", block)
    real, made = pairs(50, 16, 1)
    found = distances.kid(file_of(real), file_of(made))
    # torchmetrics compares a made picture with its own original, too.
    across = ((real.double() @ made.double().T) / 16 + 1) ** 3
    apart = (across.sum() - across.trace()) / (50 * 49)
    expected = float(poly_mmd(real.double(), made.double()) + 2 * across.mean() - 2 * apart)
    assert found.value == pytest.approx(1000 * expected, rel=1e-6)
    for left_out in (0, 6, 49):
        kept = torch.arange(50) != left_out
        without = distances.kid(file_of(real[kept]), file_of(made[kept])).value
        assert found.without[left_out] == pytest.approx(without, rel=1e-9)


def test_kid_has_no_bias_for_pictures_that_belong_together():
    """Real and made of one distribution, row by row alike, in 300 trials."""
    values = []
    for seed in range(300):
        real, made = pairs(20, 8, seed, alike=0.9, shift=0)
        values.append(distances.kid(file_of(real), file_of(made)).value)
    error = np.std(values) / 300**0.5
    assert abs(np.mean(values)) < 3 * error


def test_cmmd_has_the_constants_of_its_paper():
    real, made = pairs(40, 16, 2)

    def kernel(a, b):
        distance = torch.cdist(a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True))
        return torch.exp(-(distance**2) / (2 * 10**2))

    a, b = real.double(), made.double()
    expected = 1000 * (kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())
    found = distances.cmmd(file_of(real), file_of(made))
    assert found.value == pytest.approx(float(expected), rel=1e-6)
    assert distances.cmmd(file_of(real), file_of(real)).value == pytest.approx(0, abs=1e-9)
    kept = torch.arange(40) != 3
    without = distances.cmmd(file_of(real[kept]), file_of(made[kept])).value
    assert found.without[3] == pytest.approx(without, rel=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    total = values.sum()
    found = distances.Jackknifed(values.mean(), (total - values) / 399)
    low, high = found.interval(found.corrected)
    assert found.corrected == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.966 * values.std(ddof=1) / 20, rel=1e-3)


def test_too_few_pictures_are_told():
    real, made = pairs(2, 4, 3)
    with pytest.raises(TooFew, match=r"^2 pictures are too few .* Evaluate 3 or more"):
        distances.kid(file_of(real), file_of(made))


def fid(real, made):
    means = np.square(real.mean(0) - made.mean(0)).sum()
    covariances = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    return means + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()


def test_the_limit_of_fid_covers_the_truth_as_often_as_it_says():
    """Of 60 trials with 500 pictures and 24 features FID itself lies above the truth in all."""
    width, shift = 24, 0.2
    truth = width * shift**2 + width * shift**2  # means and, of unit covariances, spreads
    covered = above = 0
    for seed in range(60):
        real, made = (features.double().numpy() for features in pairs(500, width, seed))

        def statistic(rows, real=real, made=made):
            return fid(real[rows], made[rows])

        found = distances.jackknifed_groups(statistic, 500, seed)
        low, high = found.interval(found.corrected)
        covered += low < truth < high
        above += found.value > truth
    print(f"covered {covered}, above {above} of 60")
    assert covered >= 54  # 57 on average if it holds 95 %
    assert above > 45


# Networks -----------------------------------------------------------------------------------------


def noise_picture(seed, size=64):
    levels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(levels).resize((size, size), Image.Resampling.BICUBIC)


def test_dinov2_is_its_class_token(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=14)).eval()
    model.save_pretrained(tmp_path / "dino")
    pictures = [noise_picture(1), noise_picture(2)]
    found = DinoV2(tmp_path / "dino", CPU)(pictures)
    levels = [np.asarray(picture.resize((224, 224), 3)) / 255 for picture in pictures]
    pixels = (np.stack(levels) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float().movedim(3, 1)).pooler_output
    assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(Missing, match=r"none has no config.json.*Download it"):
        DinoV2(tmp_path / "none", CPU)
    ViTModel(ViTConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(EvaluationError, match=r"holds a vit, expected DINOv2"):
        DinoV2(tmp_path / "vit", CPU)


@pytest.fixture
def alexnet(tmp_path):
    torch.manual_seed(0)
    weights = torchvision.models.alexnet().features.state_dict(prefix="features.")
    torch.save(weights, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def test_lpips_sees_what_changed_outside_the_hole(alexnet, monkeypatch):
    lpips = Lpips(alexnet, CPU)
    original = noise_picture(1)
    hole = Image.new("L", (64, 64))
    hole.paste(255, (20, 20, 40, 40))
    inside, outside = original.copy(), original.copy()
    inside.paste((0, 255, 0), (20, 20, 40, 40))
    outside.paste((0, 255, 0), (0, 0, 40, 40))
    samples = [Sample(None, original, hole)] * 2
    found = background_lpips(PictureBatch(samples, [inside, outside], None), lpips)
    assert found[0] == 0
    assert found[1] > 1e-4
    # torchmetrics, with AlexNet as torchvision would give it.
    backbone = torchvision.models.alexnet()
    backbone.load_state_dict(torch.load(alexnet), strict=False)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda **options: backbone)
    reference = _LPIPS(pretrained=True, net="alex", pnet_rand=True, eval_mode=True)
    kept = Image.composite(original, outside, hole)
    pixels = []
    for picture in (kept, original):
        levels = torch.from_numpy(np.array(picture)).movedim(2, 0)[None]
        pixels.append(levels / 127.5 - 1)
    with torch.no_grad():
        assert found[1] == pytest.approx(float(reference(*pixels)), rel=1e-3)


def test_lpips_without_its_file_or_library(alexnet, tmp_path, monkeypatch):
    with pytest.raises(Missing, match=r"expected AlexNet's weights. Download alexnet-owt"):
        Lpips(tmp_path / "none.pth", CPU)
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(EvaluationError, match=r"x.pth is not torchvision's AlexNet"):
        Lpips(tmp_path / "x.pth", CPU)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image.lpips", None)
    with pytest.raises(Missing, match=r"LPIPS needs torchmetrics .*requirements-evaluate"):
        Lpips(alexnet, CPU)


def test_a_score_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def long(image, mask, text):\n    return len(text) + mask.width / 100\n"
        "def fails(image, mask, text):\n    raise KeyError(text)\n"
        "def endless(image, mask, text):\n    return float('nan')\n"
    )
    hole = Image.new("L", (64, 64))
    assert PictureScore(file, "long")(noise_picture(1), hole, "spoon", "7") == 5.64
    with pytest.raises(EvaluationError, match=r"fails fails on 7 .KeyError: 'spoon'.; expected"):
        PictureScore(file, "fails")(noise_picture(1), hole, "spoon", "7")
    with pytest.raises(EvaluationError, match=r"endless gives nan for 7; expected a finite"):
        PictureScore(file, "endless")(noise_picture(1), hole, "spoon", "7")
    with pytest.raises(FunctionError, match=r"has no function none; expected none.image, mask"):
        PictureScore(file, "none")
    with pytest.raises(FunctionError, match=r"is not a file, expected Python"):
        PictureScore(tmp_path / "none.py", "long")


def test_the_cache_asks_only_for_what_is_new(tmp_path):
    asked = []

    def extractor(pictures):
        asked.extend(pictures)
        levels = np.stack([np.asarray(picture)[0, :4, 0] for picture in pictures])
        return torch.from_numpy(levels).float()

    pictures = [noise_picture(seed) for seed in range(4)]
    expected = extractor(pictures)
    path = tmp_path / "new/features.sqlite"
    for identity, count, new in (("a", 2, 2), ("a", 4, 2), ("b", 4, 4), ("a", 4, 0)):
        asked.clear()
        cached = FeatureCache(path)(extractor, identity)
        assert torch.equal(cached(pictures[:count]), expected[:count])
        assert len(asked) == new
    path.write_bytes(b"no database" * 100)
    with pytest.raises(EvaluationError, match=r"cannot be used as a cache .* another --cache"):
        FeatureCache(path)
