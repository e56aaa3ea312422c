from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mindtune",
    version="0.2.0",
    description="Fine-tuning scripts for FLUX.1 and Stable Diffusion ControlNet on MindSpore",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9,<3.13",
    packages=find_packages(include=["mindtune", "mindtune.*"]),
    extras_require={
        # The newest that takes the huggingface_hub of requirements.txt; docs/app.md says why not for Python 3.9.
        "app": ['gradio==6.17.3; python_version >= "3.10"'],
        "modelscope": ["modelscope==1.37.1"],
    },
)
