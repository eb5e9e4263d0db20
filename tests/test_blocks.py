"""Block layouts and the four masks, against the reference implementations' arrays."""

import contextlib
import itertools

import numpy as np
import pytest

from launch import plot_masks
from omniforcing_jax.blocks import BlockLayout, KvEnds

# Reference masks: fixture file, layout; video latents, audio latents, patches per latent, sinks.
REFERENCES = {
    "merged": ("omniforcing_v2", BlockLayout.merged(), (10, 76, 6, 0)),
    "prefix": ("omniforcing_v1", BlockLayout.prefix(), (7, 51, 4, 16)),
}
LAYOUTS = [  # and sinks
    (BlockLayout.prefix(), 0),
    (BlockLayout.merged(), 0),
    (BlockLayout.prefix(), 16),
    (BlockLayout.merged(frame_rate=30.0), 2),
]


@pytest.mark.parametrize("name", REFERENCES)
def test_masks_equal_reference(golden_dir, name):
    folder, layout, sizes = REFERENCES[name]
    expected = np.load(golden_dir / folder / "expected.npz")
    masks = layout.masks(*sizes)
    np.testing.assert_array_equal(masks.video, expected["mask_video_self"])
    np.testing.assert_array_equal(masks.audio, expected["mask_audio_self"])
    np.testing.assert_array_equal(masks.a2v, expected["mask_a2v"])
    np.testing.assert_array_equal(masks.v2a, expected["mask_v2a"])


@pytest.mark.parametrize("name", REFERENCES)
def test_block_borders_equal_reference(golden_dir, name):
    folder, layout, _ = REFERENCES[name]
    expected = np.load(golden_dir / folder / "expected.npz")
    table = expected["blocks_video_start_end_audio_start_end"]
    np.testing.assert_array_equal(borders(layout, len(table)), table)


def test_block_borders_of_another_length_equal_reference(golden_dir):
    expected = np.load(golden_dir / "omniforcing_v1" / "expected.npz")["blocks_16_video_frames"]
    np.testing.assert_array_equal(borders(BlockLayout.prefix(), len(expected)), expected)


def borders(layout: BlockLayout, num_blocks: int) -> np.ndarray:
    """[K, 4]: video start, video end, audio start, audio end of every block, ends exclusive."""
    starts = [
        (layout.num_video_frames(k), layout.num_audio_frames(k)) for k in range(num_blocks + 1)
    ]
    return np.array([(v, v_end, a, a_end) for (v, a), (v_end, a_end) in itertools.pairwise(starts)])


@pytest.mark.parametrize("layout, sinks", LAYOUTS, ids=str)
@pytest.mark.parametrize("video_frames, audio_frames", [(10, 76), (7, 51), (6, 42), (4, 26)])
def test_kv_ends_say_the_same_as_masks(layout, sinks, video_frames, audio_frames):
    masks = layout.masks(video_frames, audio_frames, 3, sinks)
    ends = layout.kv_ends(video_frames, audio_frames, 3, sinks)
    for name in KvEnds._fields:
        mask, end = getattr(masks, name), getattr(ends, name)
        assert end.dtype == np.int32
        assert end.min() >= 1
        np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < end[:, None], err_msg=name)


@pytest.mark.parametrize("layout, sinks", LAYOUTS, ids=str)
def test_sizes_starts_and_block_indices_agree(layout, sinks):
    num_blocks = 5
    video = [k for k in range(num_blocks) for _ in range(layout.video_frames_in(k))]
    audio = [k for k in range(num_blocks) for _ in range(layout.audio_frames_in(k))]
    assert layout.num_video_frames(num_blocks) == len(video)
    assert layout.num_audio_frames(num_blocks) == len(audio)
    np.testing.assert_array_equal(layout.block_of_video_frame(np.arange(len(video))), video)
    np.testing.assert_array_equal(layout.block_of_audio_frame(np.arange(len(audio))), audio)
    for k in range(num_blocks):
        assert layout.num_video_frames(k) == video.index(k)
        assert layout.num_audio_frames(k) == audio.index(k)
    patches = 2
    np.testing.assert_array_equal(
        layout.video_token_blocks(len(video), patches), np.repeat(video, patches)
    )
    np.testing.assert_array_equal(layout.audio_token_blocks(len(audio), sinks), [0] * sinks + audio)


def test_sinks_belong_to_the_global_prefix():
    masks = BlockLayout.prefix().masks(7, 51, patches=4, num_sinks=16)
    assert masks.audio[:, :17].all(), "sinks and the audio prefix are visible to all audio"
    assert masks.a2v[:, :17].all(), "sinks and the audio prefix are visible to all video"
    assert not masks.audio[:17, 17:].any(), "sinks see no audio behind the prefix"
    assert not masks.v2a[:17, 4:].any(), "sinks see no video behind the prefix"


def test_paper_formulas():
    """Eq. 2 and 3 as printed, for tokens behind the prefix."""
    layout, patches, later_blocks = BlockLayout.prefix(), 384, 5
    assert layout.num_video_frames(later_blocks + 1) == 1 + later_blocks * 3
    assert layout.num_audio_frames(later_blocks + 1) == 1 + later_blocks * 25
    q = np.arange(patches, 16 * patches)
    tau_v = 1 + (q - patches) // (3 * patches)
    np.testing.assert_array_equal(layout.video_token_blocks(16, patches)[patches:], tau_v)
    j = np.arange(1, 126)
    np.testing.assert_array_equal(layout.audio_token_blocks(126)[1:], 1 + (j - 1) // 25)


@pytest.mark.parametrize(
    "frame_rate, audio_frames", [(24, 25), (25, 24), (30, 20), (12, 50), (50, 12), (60, 10)]
)
def test_frame_rates(frame_rate, audio_frames):
    prefix = BlockLayout.from_name("prefix", frame_rate=frame_rate)
    merged = BlockLayout.from_name("merged", frame_rate=frame_rate)
    assert (prefix.first_audio_frames, prefix.audio_frames) == (1, audio_frames)
    assert (merged.first_audio_frames, merged.audio_frames) == (audio_frames + 1, audio_frames)
    for layout in (prefix, merged):
        assert layout.frame_rate == pytest.approx(frame_rate)
        assert layout.block_seconds == pytest.approx(3 * 8 / frame_rate)


@pytest.mark.parametrize("frame_rate", [29.97, 23.976, 48, 16, 24.01, 7.5e3, 0, -24])
def test_frame_rate_that_splits_an_audio_latent_is_refused(frame_rate):
    with pytest.raises(ValueError, match=r"12, 15, 20, 24, 25, 30, 40, 50, 60"):
        BlockLayout.from_name("prefix", frame_rate=frame_rate)


@pytest.mark.parametrize(
    "layout, blocks, pixel_frames",
    [
        (BlockLayout.prefix(), 6, 121),
        (BlockLayout.merged(), 5, 121),
        (BlockLayout.prefix(), 1, 1),
        (BlockLayout.merged(), 1, 25),
    ],
)
def test_pixel_frames(layout, blocks, pixel_frames):
    assert layout.pixel_frames(blocks) == pixel_frames


@pytest.mark.parametrize("layout", [LAYOUTS[0][0], LAYOUTS[1][0], LAYOUTS[3][0]], ids=str)
@pytest.mark.parametrize("seconds", [0.04, 0.1 * 3, 1, 1.01, 5, 59.9, 3600])
def test_blocks_for_seconds_is_the_smallest_that_suffices(layout, seconds):
    blocks = layout.blocks_for_seconds(seconds)
    wanted = seconds * layout.frame_rate - 1e-6
    assert layout.pixel_frames(blocks) >= wanted
    assert blocks == 1 or layout.pixel_frames(blocks - 1) < wanted


def test_five_seconds_is_the_published_clip():
    assert BlockLayout.merged().blocks_for_seconds(5) == 5
    assert BlockLayout.prefix().blocks_for_seconds(5) == 6
    assert BlockLayout.merged().num_video_frames(5) == 16
    assert BlockLayout.merged().num_audio_frames(5) == 126


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match="unknown block layout 'paper'"):
        BlockLayout.from_name("paper")
    with pytest.raises(ValueError, match="video_frames must be an integer >= 1, got 0"):
        BlockLayout(1, 0, 1, 25)
    with pytest.raises(ValueError, match="seconds must be positive"):
        BlockLayout.prefix().blocks_for_seconds(0)


def test_mask_plot(tmp_path, capsys):
    output = tmp_path / "new" / "masks.png"
    plot_masks.main(["--seconds", "1", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")

    mask = np.array([[True, True, False], [True, True, True]])
    cells = plot_masks.color_cells(mask, key_blocks=np.array([0, 0, 1]), key_sinks=1)
    sink, prefix, allowed, masked = (
        plot_masks.SINK,
        plot_masks.PREFIX,
        plot_masks.ALLOWED,
        plot_masks.MASKED,
    )
    np.testing.assert_array_equal(cells, [[sink, prefix, masked], [sink, prefix, allowed]])

    for arguments, message in (
        (["--seconds", "600"], "tokens are too many to draw"),
        (["--frame_rate", "29.97"], "does not hold a whole number of audio latents"),
        (["--frame_rate", "nan"], "frame_rate: must be at least"),
        (["--patches", "0"], "--patches: must be at least 1"),
    ):
        with contextlib.suppress(SystemExit):  # of the parser
            assert plot_masks.main([*arguments, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
