# nanoforge in a container; without a command it runs README's first run.
#
#   docker build -t nanoforge .                                    CPU
#   docker build -t nanoforge --build-arg DEVICE=cuda .            NVIDIA GPUs: run with --gpus=all
#   mkdir -p out && docker run --rm --user="$(id -u):$(id -g)" -v "$PWD/out:/nanoforge/out" nanoforge
#   docker run --rm -it --user="$(id -u):$(id -g)" -v "$PWD/out:/nanoforge/out" nanoforge python sample.py --chat --out_dir=out/chat
FROM python:3.12-slim

# The compiler is what torch.compile and the kernel of fast sampling need.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /nanoforge
COPY requirements.txt ./

# PyPI's torch brings CUDA's libraries; the build for CPUs comes from PyTorch's own index, and is a fifth of the size.
ARG DEVICE=cpu
RUN case "$DEVICE" in \
        cpu) pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "DEVICE=$DEVICE: must be cpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -r requirements.txt

# Optional packages by name, such as --build-arg OPTIONAL="gguf datasets".
ARG OPTIONAL=""
# hadolint ignore=SC2086,DL3013
RUN if [ -n "$OPTIONAL" ]; then pip install --no-cache-dir $OPTIONAL; fi

# Any user may write here, so that --user can be the one who owns the mounted folder.
RUN useradd --uid 1000 nanoforge && mkdir out && chmod 777 . out
COPY . .
RUN chmod -R a+rwX data
USER 1000
ENV HOME=/tmp USER=nanoforge PYTHONUNBUFFERED=1
CMD ["sh", "-c", "python train.py configs/quickstart.py && python sample.py --out_dir=out/quickstart --start='def '"]
