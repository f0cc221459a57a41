"""A random model in miniature on disk, what loads pipelines of it, and a clip for them."""

import pytest
from tiny_pipelines import loader, noisy_clip, save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def load(folder):
    return loader(folder)


@pytest.fixture
def clip():
    return noisy_clip()
