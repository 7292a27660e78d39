# One Dockerfile for the page and the worker; docker-compose.yml says which command an image runs.
#
# As it stands it builds the image of the page, with torch's CPU build. The worker's is built with
# torch's CUDA build, the extra `gpu`, and a C compiler, which Triton calls when a kernel first runs:
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple --build-arg EXTRAS=gpu \
#     --build-arg SYSTEM_PACKAGES="gcc libc6-dev" --tag delta-studio-worker .
#
# Python's SQLite here is Debian's, which has the fault that `studio doctor` names. Under docker
# compose the rows lie in PostgreSQL, so it does not matter; who runs the image without a
# STUDIO_DATABASE_URL should make backups. Health checks stand in docker-compose.yml, since page and
# worker have different ones.
FROM python:3.11.14-slim-bookworm

ARG SYSTEM_PACKAGES=""
ARG TORCH_INDEX="https://download.pytorch.org/whl/cpu"
ARG EXTRAS=""

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

RUN if [ -n "$SYSTEM_PACKAGES" ]; then \
      apt-get update -qq && \
      apt-get install --yes -qq --no-install-recommends $SYSTEM_PACKAGES && \
      rm -rf /var/lib/apt/lists/*; \
    fi

# The same user in every image, so that page and worker may share a volume. A new volume takes its
# owner from the folder that it is mounted on.
RUN groupadd --gid 10001 studio && \
    useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin studio && \
    install --directory --owner=studio --group=studio --mode=0700 /data /cache /cache/tmp

# What is installed from elsewhere comes before our own code, so that a change of ours does not
# load it again. torch comes first: only its build differs from image to image, constraints.txt
# names its version. What that build needs itself is installed with all the rest.
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch && \
    mkdir studio workers && \
    pip install --constraint constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"

COPY studio/ studio/
COPY workers/ workers/
COPY templates/ templates/
RUN pip install --no-deps --editable . && python -m compileall -q studio workers

# The root file system may be read-only: all that is written goes to the two volumes.
ENV STUDIO_HOME=/data \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    CUDA_CACHE_PATH=/cache/cuda \
    XDG_CACHE_HOME=/cache \
    TMPDIR=/cache/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
CMD ["studio", "doctor"]
