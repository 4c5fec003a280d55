"""Which settings a run may go on with."""

import pytest

from ldmcli.core import config, runs
from ldmcli.core.errors import ModelError
from ldmcli.training.run_setup import RunOptions, claim_run_folder


@pytest.mark.parametrize(
    ("changed", "goes_on"),
    [
        ("train.steps=9", True),
        ("data.cache=false", True),
        ("data.cache_dir=elsewhere", True),
        ("train.compile=true", True),
        ("data.cache_views=2", False),  # other crops
        ("train.noise=device", False),
        ("train.batch_size=7", False),
    ],
)
def test_what_changes_what_is_learned_is_refused_unless_allowed(changed, goes_on, tmp_path):
    def resolved(*assignments):
        given = ("data.crop=random", *assignments)
        return config.resolve("diffusion", config.gather("diffusion", assignments=given))

    folder = runs.RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.update(kind="diffusion", state="interrupted", step=1)
    (folder.path / "config.toml").write_text(config.to_toml(resolved().config))
    name = changed.partition("=")[0]
    for allow in ((), (name,)):
        try:
            if goes_on or allow:
                claim_run_folder(folder, "diffusion", resolved(changed), RunOptions(allow=allow))
            else:
                with pytest.raises(ModelError, match=f"other settings \\({name}: "):
                    claim_run_folder(folder, "diffusion", resolved(changed), RunOptions(allow=allow))
        finally:
            folder.release()
