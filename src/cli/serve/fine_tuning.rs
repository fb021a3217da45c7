//! From the flags of `tunesmith serve` to its fine-tuning service.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};

use super::{ServeArgs, parse_bytes};
use crate::api::{ServerConfig, Services};
use crate::eval::graders;
use crate::jobs::{Gate, JobsConfig, Parts, Service, Webhook};

const DEFAULT_FILE_QUOTA: &str = "10GiB";
const DEFAULT_ORGANIZATION: &str = "tunesmith";

/// The service, where a data folder is given.
pub(super) fn open(
    args: &ServeArgs,
    server: &ServerConfig,
    services: &Services,
) -> anyhow::Result<Option<Arc<Service>>> {
    let Some(data_dir) = &args.data_dir else { return Ok(None) };
    std::fs::create_dir_all(data_dir)
        .and_then(|()| data_dir.canonicalize())
        .with_context(|| format!("--data-dir {}", data_dir.display()))
        .and_then(|data_dir| {
            let parts = Parts {
                engine: services.engine.clone(),
                registry: Arc::clone(&services.registry),
                tokenizer: Arc::clone(&services.tokenizer),
                template: Arc::clone(&services.template),
                eos_token_ids: server.eos_token_ids.clone(),
            };
            let service = Service::open(config(args, server, data_dir)?, parts)?;
            service.start()?;
            Ok(Some(service))
        })
}

fn config(
    args: &ServeArgs,
    server: &ServerConfig,
    data_dir: PathBuf,
) -> anyhow::Result<JobsConfig> {
    let bytes = |flag, text: &str| parse_bytes(text).context(flag).map(|bytes| bytes as u64);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let organization = args.organization.as_deref().unwrap_or(DEFAULT_ORGANIZATION).to_owned();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    ensure!(
        !organization.is_empty() && organization.len() <= 64 && organization.chars().all(plain),
        "--organization {organization:?}: letters, digits and dashes, at most 64"
    );
    let gate = args.gate.as_deref().map(|metric| {
        let known = || graders::GRADERS.iter().map(|grader| grader.name).collect::<Vec<_>>();
        let unknown = || format!("--gate {metric}: expected one of {}", known().join(", "));
        graders::position(metric).with_context(unknown)?;
        anyhow::Ok(Gate { metric: metric.to_owned(), ..Gate::default() })
    });
    Ok(JobsConfig {
        data_dir,
        base_name: server.model_name.clone(),
        base_dir: PathBuf::from(&server.model_root),
        quantize: args.quantize.unwrap_or_default(),
        organization,
        max_running: args.max_jobs.unwrap_or(1).max(1),
        threads: args.job_threads.unwrap_or(cores / 2).max(1),
        memory: args.job_memory.as_deref().map(|text| bytes("--job-memory", text)).transpose()?,
        file_quota: bytes(
            "--file-quota",
            args.file_quota.as_deref().unwrap_or(DEFAULT_FILE_QUOTA),
        )?,
        webhooks: args.webhook.iter().map(|text| webhook(text)).collect::<anyhow::Result<_>>()?,
        gate: gate.transpose()?,
        allow_python: args.allow_python_graders.unwrap_or(false),
        executable: this_program()?,
    })
}

/// This program, for children to run: on Linux the one that is running, also when its file has been
/// replaced or removed since.
fn this_program() -> std::io::Result<PathBuf> {
    if cfg!(target_os = "linux") { Ok("/proc/self/exe".into()) } else { std::env::current_exe() }
}

/// `URL` or `URL=whsec_SECRET`.
fn webhook(text: &str) -> anyhow::Result<Webhook> {
    let (url, secret) = match text.rsplit_once("=whsec_") {
        Some((url, secret)) => (url, Some(format!("whsec_{secret}"))),
        None => (text, None),
    };
    ensure!(
        url.starts_with("http://") || url.starts_with("https://"),
        "--webhook {url}: expected http:// or https://"
    );
    Ok(Webhook { url: url.to_owned(), secret })
}
