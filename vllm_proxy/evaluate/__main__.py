"""The harness's own command line with our model registered: the harness loads no plugins.

python -m vllm_proxy.evaluate run --model vllm_proxy --model_args config=FILE --tasks …
"""

from lm_eval.__main__ import cli_evaluate

import vllm_proxy.evaluate.lm  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
