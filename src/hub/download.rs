//! The network's part: which files of a repository are wanted, and their way into the cache.

use std::{
    collections::HashMap,
    error::Error,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use hf_hub::{
    HFClient, HFError,
    progress::{DownloadEvent, ProgressEvent, ProgressHandler},
    split_id,
};

use super::{HubError, PullProgress, Repo, SINGLE_WEIGHTS, WEIGHTS_INDEX};

/// What a model folder has beside its weights, as far as it is read here.
const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Templates besides the default one.
const MORE_TEMPLATES: &str = "additional_chat_templates/";
/// What an adapter's repository has.
const ADAPTER: &[&str] = &["adapter_config.json", "adapter_model.safetensors"];
/// Pickles: Python programs as much as data.
const PICKLE_EXTENSIONS: &[&str] = &["bin", "pt", "pth", "pkl", "ckpt"];

/// Downloads what is missing of `repo` into `cache` and returns its folder there. Blocking.
pub(super) fn snapshot(
    repo: &Repo,
    cache: &Path,
    on_progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<PathBuf, HubError> {
    // The Hub's transfer library asks for a runtime of several threads.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed(repo, "the Hub", &error))?;
    runtime.block_on(download(repo, cache, Meter::new(on_progress)))
}

async fn download(
    repo: &Repo,
    cache: &Path,
    meter: impl ProgressHandler + 'static,
) -> Result<PathBuf, HubError> {
    // 1. The client, which takes HF_ENDPOINT and HF_TOKEN from the environment.
    let client = HFClient::builder()
        .cache_dir(cache)
        .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| failed(repo, "the Hub", &error))?;
    let refused = |error| explain(repo, client.endpoint(), &error);
    let (owner, name) = split_id(&repo.id);
    let remote = client.model(owner, name);
    // 2. What there is, and what of it is wanted.
    let info = remote.info().revision(repo.revision.as_str()).send().await.map_err(refused)?;
    let files = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename);
    let wanted = wanted(&files.collect::<Vec<_>>())
        .map_err(|reason| HubError::Unusable { repo: repo.clone(), reason })?;
    // 3. The files that the cache does not have yet.
    remote
        .snapshot_download()
        .revision(repo.revision.as_str())
        .allow_patterns(wanted)
        .progress(meter)
        .send()
        .await
        .map_err(refused)
}

/// The files to download, or why this is nothing to download.
fn wanted(names: &[String]) -> Result<Vec<String>, String> {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let ends_with = |name: &str, extension: &str| {
        Path::new(name).extension().is_some_and(|found| found == extension)
    };
    let is_companion = |name: &str| {
        COMPANIONS.contains(&name)
            || name.strip_prefix(MORE_TEMPLATES).is_some_and(|rest| !rest.contains('/'))
    };
    let is_adapter = ADAPTER.iter().all(|name| has(name));
    // Copies in other layouts (original/, consolidated) would only double the download.
    let is_weights = |name: &str| {
        if is_adapter {
            return ADAPTER.contains(&name);
        }
        if has(SINGLE_WEIGHTS) {
            return name == SINGLE_WEIGHTS;
        }
        let is_shard = !name.contains('/')
            && ends_with(name, "safetensors")
            && !name.starts_with("consolidated");
        has(WEIGHTS_INDEX) && (is_shard || name == WEIGHTS_INDEX)
    };
    if !names.iter().any(|name| is_weights(name)) {
        let is_pickle =
            |name: &&String| PICKLE_EXTENSIONS.iter().any(|extension| ends_with(name, extension));
        let pickle = names.iter().find(is_pickle);
        return Err(match pickle {
            Some(pickle) => format!(
                "its weights are Python pickles ({pickle}), which can run code when they are opened \
                 and are never read; look for a copy or a revision with model.safetensors, or convert \
                 it with `save_pretrained(folder, safe_serialization=True)` in Python"
            ),
            None if names.iter().any(|name| ends_with(name, "gguf")) => {
                "its weights are GGUF files, which are not read; look for the original repository"
                    .to_owned()
            }
            None => format!("it has neither {SINGLE_WEIGHTS} nor {WEIGHTS_INDEX}"),
        });
    }
    let needed: &[&str] = if is_adapter { &[] } else { &["config.json", "tokenizer.json"] };
    if let Some(missing) = needed.iter().find(|name| !has(name)) {
        return Err(format!("it has no {missing}"));
    }
    let is_wanted = |name: &&String| is_companion(name) || is_weights(name);
    Ok(names.iter().filter(is_wanted).cloned().collect())
}

/// Each error repeats the one it was caused by, so the first one says it all.
fn failed(repo: &Repo, endpoint: &str, error: &dyn Error) -> HubError {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    let (endpoint, reason) = (endpoint.to_owned(), cause.to_string());
    HubError::Download { repo: repo.clone(), endpoint, reason }
}

fn explain(repo: &Repo, endpoint: &str, error: &HFError) -> HubError {
    if matches!(error, HFError::AuthRequired { .. } | HFError::Forbidden { .. }) {
        return HubError::Denied { repo: repo.clone(), endpoint: endpoint.to_owned() };
    }
    if matches!(error, HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. }) {
        return HubError::NotFound { repo: repo.clone(), endpoint: endpoint.to_owned() };
    }
    failed(repo, endpoint, error)
}

/// Adds the files' progress up.
struct Meter<F> {
    on_progress: F,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    /// `None` before the totals are known.
    totals: Option<(usize, u64)>,
    /// Bytes that are here, by file.
    bytes: HashMap<String, u64>,
}

impl<F> Meter<F> {
    fn new(on_progress: F) -> Self {
        Self { on_progress, counts: Mutex::default() }
    }
}

impl<F: Fn(PullProgress) + Send + Sync> ProgressHandler for Meter<F> {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            // Each file says it again, for itself alone.
            DownloadEvent::Start { total_files, total_bytes } => {
                counts.totals.get_or_insert((*total_files, *total_bytes));
            }
            DownloadEvent::Progress { files } => {
                for file in files {
                    counts.bytes.insert(file.filename.clone(), file.bytes_completed);
                }
            }
            DownloadEvent::AggregateProgress { .. } | DownloadEvent::Complete => return,
        }
        let Some((num_files, total_bytes)) = counts.totals else { return };
        let bytes = counts.bytes.values().sum::<u64>().min(total_bytes);
        (self.on_progress)(PullProgress { num_files, bytes, total_bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        list.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn only_what_a_model_is_loaded_from_is_wanted() {
        let parts =
            "config.json tokenizer.json tokenizer_config.json additional_chat_templates/rag.jinja";
        let other = "README.md .gitattributes pytorch_model.bin original/model.safetensors \
                     onnx/model.onnx consolidated.safetensors tokenizer.model";
        for (weights, left) in [
            ("model.safetensors", "model-00001-of-00001.safetensors"),
            ("model-1-of-2.safetensors model-2-of-2.safetensors model.safetensors.index.json", ""),
            ("adapter_config.json adapter_model.safetensors", "model.safetensors"),
        ] {
            let all = names(&format!("{other} {parts} {left} {weights}"));
            assert_eq!(wanted(&all).unwrap(), names(&format!("{parts} {weights}")), "{weights}");
        }
    }

    #[test]
    fn a_repository_without_usable_weights_is_refused_by_what_it_has() {
        for (list, word) in [
            ("config.json tokenizer.json pytorch_model-00001-of-00002.bin", "pytorch_model-00001"),
            ("config.json model-q4.gguf", "GGUF"),
            ("README.md", "model.safetensors"),
            ("config.json tokenizer.model model.safetensors", "tokenizer.json"),
            ("tokenizer.json model.safetensors", "config.json"),
            ("config.json tokenizer.json model-00001-of-00002.safetensors", "index"),
        ] {
            let reason = wanted(&names(list)).unwrap_err();
            assert!(reason.contains(word), "{list}: {reason}");
        }
    }
}
