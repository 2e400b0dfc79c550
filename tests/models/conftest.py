import mimo_models
import pytest

from hf_compressm.models import MimoSSMForCausalLM


@pytest.fixture
def lm():
    return MimoSSMForCausalLM(mimo_models.config()).eval()
