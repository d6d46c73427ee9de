import numpy as np

from imaging.dead_leaves import dead_leaves


def test_dead_leaves_are_reproducible_and_never_shared():
    train, again, test = (dead_leaves(role, 3, 60) for role in ("train", "train", "test"))
    assert list(train) == ["leaves1", "leaves2", "leaves3"]
    assert {(image.mode, image.size) for image in train.values()} == {("RGB", (60, 60))}
    assert train == again
    assert len({image.tobytes() for images in (train, test) for image in images.values()}) == 6


def test_dead_leaves_have_spectrum_of_natural_images():
    """Power falls with frequency as f^-a with a near 2; white noise has 0, a smooth ramp above 3."""
    slopes = []
    for image in dead_leaves("train", 4).values():
        gray = np.asarray(image.convert("L")).astype(float)
        gray = (gray - gray.mean()) * np.hanning(len(gray))[:, None] * np.hanning(len(gray))
        power = abs(np.fft.fftshift(np.fft.fft2(gray))) ** 2
        y, x = np.indices(power.shape) - len(gray) // 2
        radius = np.hypot(x, y).astype(int)
        profile = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
        f = np.arange(4, 80)
        slopes.append(-np.polyfit(np.log(f), np.log(profile[f]), 1)[0])
    assert 1.5 < np.mean(slopes) < 3, slopes
