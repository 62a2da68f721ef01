"""The original implementations, which come with `pip install -e .[peers]`, and small models of theirs."""

import pathlib
import sys
import warnings

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from peers import imported
from small import IDS, MASK, SIZES


@pytest.fixture(scope="session")
def torch():
    found = imported("torch")
    found.set_num_threads(1)
    _declare_operators(found)
    return found


def _declare_operators(torch):
    """PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled operators can't be loaded, and its
    import, which transformers and lpips make, fails where it describes two of them; no model here uses them."""
    try:
        imported("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _KEPT[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except pytest.skip.Exception:
        pass


_KEPT = []  # an operator is gone when its library is


@pytest.fixture(scope="session")
def transformers(torch):
    found = imported("transformers")
    found.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = found.T5EncoderModel, found.T5ForConditionalGeneration  # imported when they are asked for
    return found


@pytest.fixture(scope="session")
def torchvision(torch):
    return imported("torchvision")


@pytest.fixture(scope="session")
def lpips(torchvision):
    return imported("lpips")


@pytest.fixture(scope="session")
def hf_model(torch, transformers):
    """Makes a T5 of Hugging Face with random parameters, none of them as it is initialised."""

    def make(gated: bool = True, encoder_only: bool = False, **sizes):
        config = transformers.T5Config(
            **{**SIZES, "num_decoder_layers": 1, **sizes}, feed_forward_proj="gated-gelu" if gated else "relu"
        )
        torch.manual_seed(0)
        kind = transformers.T5EncoderModel if encoder_only else transformers.T5ForConditionalGeneration
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
                parameter += 0.1 * torch.randn_like(parameter) * (parameter.dim() == 1)
        return model

    return make


@pytest.fixture(scope="session")
def hf_embeddings(torch):
    """What a T5 of Hugging Face makes of the prompts."""

    def embed(model, ids=IDS, mask=MASK):
        with torch.no_grad():
            ids, mask = torch.tensor(np.array(ids)).long(), torch.tensor(np.array(mask)).long()
            return model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()

    return embed
