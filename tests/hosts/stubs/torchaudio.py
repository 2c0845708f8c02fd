"""In place of torchaudio, which LLaMA-Factory imports at its start; its wheels on PyPI need CUDA."""
