import torch

from unmask.nn.references import fill_bilinear, fill_mean, fill_nearest_patch, fills


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Left half 1, right half 3; of a 4 x 4 grid of 2-pixel patches the two middle columns are hidden."""
    image = torch.ones(1, 1, 8, 8)
    image[..., 4:] = 3
    hidden = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hidden[..., 2:6] = True
    return image, hidden


def test_visible_pixels_are_never_changed():
    torch.manual_seed(0)
    images = torch.randn(3, 2, 12, 16)
    hidden = (torch.rand(3, 1, 3, 4) < 0.5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for filled in fills(images, hidden, (4, 4)).values():
        assert torch.equal(filled.masked_select(~hidden), images.masked_select(~hidden))
        assert torch.isfinite(filled).all()


def test_the_mean_fill_is_the_mean_of_what_is_seen():
    image, hidden = halves()
    assert fill_mean(image, hidden)[hidden].unique().tolist() == [2.0]


def test_the_nearest_patch_fill_copies_the_neighbour():
    image, hidden = halves()
    assert torch.equal(fill_nearest_patch(image, hidden, (2, 2)), image)


def test_the_bilinear_fill_lies_between_its_neighbours_and_rises_across_the_hole():
    image, hidden = halves()
    row = fill_bilinear(image, hidden)[0, 0, 4]
    assert (row >= 1 - 1e-6).all()
    assert (row <= 3 + 1e-6).all()
    assert row[2] < row[5]


def test_a_constant_image_is_filled_exactly_by_all_three():
    image, hidden = torch.full((1, 3, 8, 8), 0.25), halves()[1]
    for filled in fills(image, hidden, (2, 2)).values():
        assert torch.allclose(filled, image, atol=1e-6)
