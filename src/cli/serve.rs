//! `tunesmith serve`: loads a model and its adapters, then answers OpenAI's HTTP interface.

mod args;
mod fine_tuning;

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

pub use self::args::ServeArgs;
use super::{
    common::{LoadedModel, load_model},
    config::{parse_bytes, with_file},
};
use crate::adapters::AdapterRegistry;
use crate::api::{self, AdapterRoots, ApiKeys, AppState, ServerConfig, Services};
use crate::engine::{self, EngineConfig};
use crate::model::ModelConfig;
use crate::telemetry;

const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 8000;
const DEFAULT_KV_CACHE_MEMORY: &str = "1GiB";
const DEFAULT_SHUTDOWN_TIMEOUT_SECONDS: u64 = 30;

/// Exit code of a server that was told to stop a second time: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// Serves until SIGINT or SIGTERM, then lets running requests finish.
///
/// # Errors
/// Every reason not to start, naming the flag or the file, and a failure of the engine.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let file = args.config.clone();
    let args = with_file(args, file.as_deref())?;
    tracing::info!("configuration: {}", args.redacted());
    let address = address(&args)?;
    let keys = keys(&args, address.ip())?;
    let model = args.model.as_deref().context("--model is required (or `model:` in --config)")?;
    let loaded = load_model(model, args.quantize.unwrap_or_default().into())?;
    telemetry::install_metrics();
    let needs_key = !keys.is_empty();
    let access = Access { local_only: !needs_key && address.ip().is_loopback(), keys };
    let state = build_state(loaded, &args, model, access)?;

    // The engine has its own thread; HTTP and text need little.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
        // Who reads that the server listens may stop it at once.
        let shutdown = shutdown_signal()?;
        announce(&state, listener.local_addr()?, needs_key);
        api::run(listener, state, shutdown).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn address(args: &ServeArgs) -> anyhow::Result<SocketAddr> {
    let host = match args.host.as_deref().unwrap_or(DEFAULT_HOST) {
        "localhost" => DEFAULT_HOST,
        host => host,
    };
    let ip: IpAddr = host.parse().with_context(|| format!("--host {host} is not an IP address"))?;
    Ok(SocketAddr::new(ip, args.port.unwrap_or(DEFAULT_PORT)))
}

/// Who may ask.
struct Access {
    keys: ApiKeys,
    local_only: bool,
}

/// Keys of flags and file. Without one, only this machine is served.
fn keys(args: &ServeArgs, ip: IpAddr) -> anyhow::Result<ApiKeys> {
    let mut api = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let before = api.len();
        api.extend(lines.map(str::to_owned));
        ensure!(api.len() > before, "--api-key-file {} has no keys", path.display());
    }
    let empty = api.iter().chain(&args.admin_key).any(|key| key.trim().is_empty());
    ensure!(!empty, "an API key must not be empty");
    let keys = ApiKeys::new(&api, &args.admin_key);
    let is_insecure = args.insecure_no_auth.unwrap_or(false);
    ensure!(
        !keys.is_empty() || ip.is_loopback() || is_insecure,
        "--host {ip} serves other machines: set --api-key or --api-key-file, or allow everybody with \
         --insecure-no-auth"
    );
    Ok(keys)
}

fn build_state(
    loaded: LoadedModel,
    args: &ServeArgs,
    model: &str,
    access: Access,
) -> anyhow::Result<Arc<AppState>> {
    let model_name = served_name(args, model, &loaded.dir)?;
    let eos_token_ids = loaded.stop_token_ids();
    let decoder = Arc::new(loaded.decoder);
    let registry = AdapterRegistry::new(decoder.config().clone())
        .with_base(&decoder)
        .with_dtype(args.lora_dtype.unwrap_or_default());
    let given = adapters_given(&args.adapter)?;
    for (name, dir) in &given {
        ensure!(*name != model_name, "--adapter {name}: that is the base model's name");
        ensure!(api::is_adapter_name(name), "--adapter {name}: not a valid name");
        let place = || format!("--adapter {name}={}", dir.display());
        let dir = dir.canonicalize().with_context(place)?;
        registry.load(name, &dir, false).with_context(place)?;
    }
    let folders: Vec<PathBuf> = given.into_iter().map(|(_, dir)| dir).collect();
    let adapter_roots =
        AdapterRoots::new(args.adapter_dir.as_deref(), &args.adapter_root, &folders)
            .context("--adapter-dir, --adapter-root")?;

    let seconds = args.shutdown_timeout.unwrap_or(DEFAULT_SHUTDOWN_TIMEOUT_SECONDS);
    let config = ServerConfig {
        model_name,
        model_root: loaded.dir.display().to_string(),
        base_fingerprint: decoder.quick_fingerprint(),
        eos_token_ids,
        keys: access.keys,
        local_only: access.local_only,
        adapter_roots,
        shutdown_timeout: Duration::from_secs(seconds),
    };
    let engine_config = engine_config(args, decoder.config())?;
    let mut services = Services {
        engine: engine::spawn(decoder, engine_config)?,
        registry: Arc::new(registry),
        tokenizer: loaded.tokenizer,
        template: loaded.template,
        jobs: None,
    };
    services.jobs = fine_tuning::open(args, &config, &services)?;
    Ok(AppState::new(config, services))
}

/// What clients call the base: as told, else the folder's own name, else the Hub's without revision.
fn served_name(args: &ServeArgs, model: &str, dir: &Path) -> anyhow::Result<String> {
    let name = match &args.served_model_name {
        Some(name) => name.clone(),
        None if Path::new(model).is_dir() => {
            let dir = dir.canonicalize()?;
            dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned()
        }
        None => model.split('@').next().unwrap_or(model).to_owned(),
    };
    ensure!(
        !name.is_empty() && !name.contains('@'),
        "--served-model-name {name:?}: not a valid name"
    );
    Ok(name)
}

fn adapters_given(adapters: &[String]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    adapters
        .iter()
        .map(|given| match given.split_once('=') {
            Some((name, dir)) => Ok((name.to_owned(), PathBuf::from(dir))),
            None => bail!("--adapter {given}: write it as NAME=DIR"),
        })
        .collect()
}

fn engine_config(args: &ServeArgs, model: &ModelConfig) -> anyhow::Result<EngineConfig> {
    for (flag, value) in [
        ("max-num-seqs", args.max_num_seqs),
        ("max-model-len", args.max_model_len),
        ("max-batch-tokens", args.max_batch_tokens),
    ] {
        ensure!(value != Some(0), "--{flag} must be at least 1");
    }
    let memory = args.kv_cache_memory.as_deref().unwrap_or(DEFAULT_KV_CACHE_MEMORY);
    let bytes = parse_bytes(memory).context("--kv-cache-memory")?;
    let max_num_seqs = args.max_num_seqs.unwrap_or(EngineConfig::DEFAULT_MAX_NUM_SEQS);
    let kv_dtype = args.kv_dtype.unwrap_or_default();
    let mut config = EngineConfig::for_cache(model, max_num_seqs, bytes, kv_dtype);
    if let Some(len) = args.max_model_len {
        let limit = config.max_sequence_len();
        ensure!(
            len <= limit,
            "--max-model-len {len}: the model and --kv-cache-memory {memory} allow {limit} tokens"
        );
        config.max_model_len = len;
    }
    config.max_queue = args.max_queue.unwrap_or(config.max_queue);
    config.max_batch_tokens = args.max_batch_tokens.unwrap_or(config.max_batch_tokens);
    config.max_queue_tokens = args.max_queue_tokens.unwrap_or(config.max_queue_tokens);
    config.max_step = args.max_step_ms.map_or(config.max_step, Duration::from_millis);
    config.speculate = match args.speculate.as_deref() {
        None => config.speculate,
        Some("off") => 0,
        Some(number) => number.parse().with_context(|| {
            format!("--speculate {number}: expected a number of tokens, or `off`")
        })?,
    };
    config.prefix_cache = args.prefix_cache.unwrap_or(config.prefix_cache);
    Ok(config)
}

/// What a person wants to see when the server is up.
fn announce(state: &AppState, address: SocketAddr, needs_key: bool) {
    let config = state.config();
    let adapters: Vec<String> =
        state.registry().list().iter().map(|v| format!("{}@v{}", v.name, v.version)).collect();
    let key = if needs_key { " -H \"Authorization: Bearer $TUNESMITH_API_KEY\"" } else { "" };
    eprintln!("model:    {} ({})", config.model_name, config.model_root);
    let adapters = if adapters.is_empty() { "none".to_owned() } else { adapters.join(", ") };
    eprintln!("adapters: {adapters}");
    eprintln!("listening on http://{address}");
    eprintln!(
        "try: curl http://{address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d \
         '{{\"model\": \"{}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
        config.model_name
    );
}

/// Completes at the first SIGINT or SIGTERM; at the second, the process ends at once.
fn shutdown_signal() -> io::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            std::process::exit(INTERRUPTED);
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any() -> IpAddr {
        "0.0.0.0".parse().unwrap()
    }

    #[test]
    fn other_machines_are_served_only_with_a_key_or_the_flag_that_says_so() {
        let localhost = "127.0.0.1".parse().unwrap();
        let none = ServeArgs::default();
        assert!(keys(&none, localhost).unwrap().is_empty());
        assert!(keys(&none, any()).is_err());
        let keyed = ServeArgs { api_key: vec!["k".to_owned()], ..ServeArgs::default() };
        assert!(!keys(&keyed, any()).unwrap().is_empty());
        let open = ServeArgs { insecure_no_auth: Some(true), ..ServeArgs::default() };
        assert!(keys(&open, any()).unwrap().is_empty());
        let empty = ServeArgs { api_key: vec![" ".to_owned()], ..ServeArgs::default() };
        assert!(keys(&empty, localhost).is_err());
    }

    #[test]
    fn a_logged_configuration_has_no_keys_in_it() {
        let args = ServeArgs {
            api_key: vec!["sk-secret".to_owned()],
            admin_key: vec!["root-secret".to_owned()],
            port: Some(1),
            ..ServeArgs::default()
        };
        let line = args.redacted().to_string();
        assert!(!line.contains("secret") && line.contains("***"), "{line}");
        assert!(line.contains("\"port\":1"), "{line}");
    }

    #[test]
    fn adapters_are_given_as_name_and_folder() {
        let given = adapters_given(&["a=b".to_owned(), "x:y=/p=q".to_owned()]).unwrap();
        let expected = [("a", "b"), ("x:y", "/p=q")];
        assert_eq!(given, expected.map(|(name, dir)| (name.to_owned(), PathBuf::from(dir))));
        assert!(adapters_given(&["a".to_owned()]).is_err());
    }
}
