# syntax=docker/dockerfile:1
FROM rust:1.95-bookworm AS build
WORKDIR /build

# 1. Dependencies, from the manifests alone: built again only when these change.
COPY Cargo.toml Cargo.lock ./
COPY benches benches
RUN mkdir src \
 && touch src/lib.rs \
 && echo 'fn main() {}' > src/main.rs \
 && cargo build --release --locked \
 && rm -r src

# 2. The program. Cargo goes by dates, and a checkout's may be older than step 1.
COPY src src
RUN find src -type f -exec touch {} + \
 && cargo build --release --locked

# 3. Folders that the unprivileged user owns, as a volume takes its owner from the image.
RUN mkdir -p /empty/models /empty/adapters /empty/data

# C library, CA certificates, a user without rights; no shell.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /build/target/release/tunesmith /usr/local/bin/tunesmith
COPY LICENSE /usr/share/doc/tunesmith/LICENSE
COPY models /usr/share/tunesmith/models
COPY --from=build --chown=nonroot:nonroot /empty/models /models
COPY --from=build --chown=nonroot:nonroot /empty/adapters /adapters
COPY --from=build --chown=nonroot:nonroot /empty/data /data

# Serving other machines asks for TUNESMITH_API_KEY or TUNESMITH_API_KEY_FILE.
ENV TUNESMITH_HOST=0.0.0.0 \
    TUNESMITH_PORT=8000 \
    TUNESMITH_MODELS=/usr/share/tunesmith/models \
    HF_HOME=/models/huggingface
WORKDIR /data
USER nonroot
VOLUME ["/models", "/adapters"]
EXPOSE 8000
# A large model takes a while to read.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["/usr/local/bin/tunesmith", "health"]
ENTRYPOINT ["/usr/local/bin/tunesmith"]
CMD ["serve"]
