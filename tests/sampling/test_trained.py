"""What a model was trained with: to JSON and back, from a run, and values that cannot be."""

import json

import pytest

from configs import stage1, stage2, stage3
from omniforcing_jax.sampling.guidance import LTX20_GUIDANCE, NO_GUIDANCE
from omniforcing_jax.sampling.trained import LTX2_BASE, TrainedSettings

EVERYTHING = TrainedSettings(
    stage="stage3",
    layout="merged",
    timesteps=(1000.0, 500.0),
    **{"window": 3, "anchors": 1, "positions": "absolute", "context_noise": 0.25},
    **{"text_length": 48, "frame_rate": 25.0, "height": 64, "width": 96, "frames": 97},
    guidance=LTX20_GUIDANCE,
    distilled_cfg=((1.0, 3.5), (5.0, 5.0)),
    modes=("t2av", "a2v"),
)


def test_goes_to_json_and_comes_back():
    for settings in (EVERYTHING, TrainedSettings(), LTX2_BASE):
        content = json.loads(json.dumps({"trained": settings.to_json()}))
        assert TrainedSettings.read(content) == settings
    assert all(value is not None for value in vars(EVERYTHING).values())
    assert TrainedSettings.read({}) == TrainedSettings()
    assert EVERYTHING.filled() == EVERYTHING
    assert (TrainedSettings().filled().text_length, TrainedSettings().filled().width) == (1024, 768)


@pytest.mark.parametrize("variant", ["19b", "pocket"])
def test_of_a_run(variant):
    """All that decides the picture, from the configuration that a run keeps."""

    def trained(stage):
        config = stage.get_config(variant).to_dict() | {"text_length": 48}
        return TrainedSettings.of_run(json.loads(json.dumps(config)))

    first, second, third = map(trained, (stage1, stage2, stage3))
    assert (first.stage, first.layout, first.window, first.causal) == ("stage1", None, None, False)
    assert second.distilled_cfg is None and second.causal
    pocket = variant == "pocket"
    assert third == TrainedSettings(
        stage="stage3",
        layout="prefix",
        timesteps=(1000.0, 909.0, 725.0, 421.0),
        **{"window": 1 if pocket else 4, "anchors": 0, "positions": "relative"},
        **{"text_length": 48, "frame_rate": 24.0, "frames": 49 if pocket else 121},
        **{"height": 48 if pocket else 512, "width": 64 if pocket else 768},
        guidance=NO_GUIDANCE,
        distilled_cfg=((1.5, 1.5), (1.5, 1.5)) if pocket else ((3.0, 3.0), (5.0, 5.0)),
    )


def test_modes_of_a_run():
    """Recorded where a run gave anything; users of others hear of it."""
    config = stage3.get_config("19b")
    assert TrainedSettings.of_run(config.to_dict()).modes is None
    config.conditions.update({"t2av": 0.5, "a2v": 0.5})
    student = TrainedSettings.of_run(config.to_dict())
    assert student.modes == ("t2av", "a2v")
    config = stage2.get_config("19b").to_dict()
    assert TrainedSettings.of_run(config).modes is None
    pairs = {"pairs_conditions": {"t2av": 0.5, "i2av": 0.5, "a2v": 0.0}}
    assert TrainedSettings.of_run(config | pairs).modes == ("t2av", "i2av")
    for able in (LTX2_BASE, TrainedSettings(stage="distilled")):
        assert student.untrained_mode("a2v") is able.untrained_mode("i2av") is None
    assert "--config.conditions.i2av of the stages trains one" in student.untrained_mode("i2av")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modes": ["talk"]}, "trained.modes must be a list of any of t2av, i2av"),
        ([], "trained \\[\\]; it is an object"),
        ({"colour": "red"}, "trained has colour; it is an object with any of stage, layout"),
        ({"text_length": 0}, "text_length must be a whole number from 1 on, not 0"),
        ({"text_length": True}, "text_length must be a whole number"),
        ({"height": 2**70}, "height must be a whole number"),
        ({"frames": 49.0}, "frames must be a whole number"),
        ({"anchors": -1}, "anchors must be a whole number from 0 on"),
        ({"frame_rate": float("inf")}, "frame_rate must be a positive number"),
        ({"frame_rate": "24"}, "frame_rate must be a positive number"),
        ({"layout": "prefix", "frame_rate": 23}, "does not hold a whole number of audio latents"),
        ({"context_noise": 1}, "context_noise must be in \\[0, 1\\)"),
        ({"context_noise": None}, "context_noise must be in \\[0, 1\\)"),
        ({"layout": ["prefix"]}, "layout must be one of prefix, merged"),
        ({"stage": 3}, "stage must be one of base"),
        ({"positions": "none"}, "positions must be one of absolute, relative"),
        ({"timesteps": 1000}, "timesteps must be a list of numbers"),
        ({"timesteps": ["1000"]}, "timesteps must be a list of numbers"),
        ({"timesteps": [500, 1000]}, "decreas"),
        ({"guidance": {"video": {}}}, "trained.guidance: "),
        ({"guidance": 3}, "trained.guidance: "),
        ({"distilled_cfg": 3.0}, "distilled_cfg must be two ranges"),
        ({"distilled_cfg": [[1, 2], 3]}, "distilled_cfg must be two ranges"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        TrainedSettings.read({"trained": values})


def test_an_earlier_version_did_not_keep_enough():
    with pytest.raises(
        ValueError, match=r"earlier version.*convert the weights, or export the run"
    ):
        TrainedSettings.read({"student": {"layout": "prefix"}})
