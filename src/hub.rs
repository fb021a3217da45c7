//! From a model's name to a folder on this machine: a folder as it is, or `owner/name[@revision]` of
//! the Hugging Face Hub, from the cache that all of the Hub's programs share, else downloaded into it.
//!
//! Knows the Hub's names, the layout of its cache, and which files make a model. Must never know
//! what is in them (but for the list of shards), nor who watches the progress.

#[cfg(feature = "hub")]
mod download;

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::Deserialize;

/// The revision that a name without one means.
const DEFAULT_REVISION: &str = "main";
const SINGLE_WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// A model on the Hub: `owner/name[@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    /// `owner/name`.
    id: String,
    /// A branch, a tag or a commit.
    revision: String,
}

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullProgress {
    /// Files to download.
    pub num_files: usize,
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes of all files together.
    pub total_bytes: u64,
}

/// Why a name leads to no folder.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a folder nor a name that the Hub could know.
    #[error("no model folder at {0}, and it is no owner/name[@revision] on the Hub either")]
    Name(String),
    /// Not here, and nothing in this program can fetch it.
    #[error(
        "{repo} is neither a folder here nor complete in the Hub cache {}, and this program was \
         built without downloads; build it with `--features hub`",
        cache.display()
    )]
    NotBuilt {
        /// What was asked for.
        repo: Repo,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// Not here, and downloads are forbidden.
    #[error(
        "{repo} is neither a folder here nor complete in the Hub cache {}, and HF_HUB_OFFLINE is set",
        cache.display()
    )]
    Offline {
        /// What was asked for.
        repo: Repo,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// The Hub does not have it.
    #[error("{repo} is neither a folder here nor a model on the Hub ({endpoint})")]
    NotFound {
        /// What was asked for.
        repo: Repo,
        /// The Hub that was asked.
        endpoint: String,
    },
    /// The Hub does not show it to this user. It says so of what does not exist as well.
    #[error(
        "the Hub ({endpoint}) does not show {repo}: it does not exist, or it is private or gated; for \
         those, accept the terms on its page and set HF_TOKEN"
    )]
    Denied {
        /// What was asked for.
        repo: Repo,
        /// The Hub that was asked.
        endpoint: String,
    },
    /// A repository that is no model which could be loaded.
    #[error("{repo} cannot be used: {reason}")]
    Unusable {
        /// The repository.
        repo: Repo,
        /// What is missing, or there instead.
        reason: String,
    },
    /// The network, the Hub or the disk failed.
    #[error("cannot download {repo} from {endpoint}: {reason}")]
    Download {
        /// The repository.
        repo: Repo,
        /// The Hub that was asked.
        endpoint: String,
        /// The first cause, in its own words.
        reason: String,
    },
}

/// The folder of `model`: itself if it is one; else the repository of that name in the cache if it
/// is complete there, without any request; else downloaded. `on_progress` is called from another
/// thread, and only where something is downloaded.
///
/// # Errors
/// Every [`HubError`].
pub fn resolve(
    model: &str,
    on_progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<PathBuf, HubError> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    let repo: Repo = model.parse()?;
    match cached(&repo) {
        Some(dir) => Ok(dir),
        None => fetch(repo, on_progress),
    }
}

/// Brings the repository `owner/name[@revision]` up to date in the cache and returns its folder.
/// What the cache has is not downloaded again; with `HF_HUB_OFFLINE=1` nothing is.
///
/// # Errors
/// Every [`HubError`].
pub fn pull(
    model: &str,
    on_progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<PathBuf, HubError> {
    let repo: Repo = model.parse()?;
    if is_offline()
        && let Some(dir) = cached(&repo)
    {
        return Ok(dir);
    }
    fetch(repo, on_progress)
}

#[cfg(feature = "hub")]
fn fetch(
    repo: Repo,
    on_progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<PathBuf, HubError> {
    let cache = cache_dir();
    if is_offline() {
        return Err(HubError::Offline { repo, cache });
    }
    let dir = download::snapshot(&repo, &cache, on_progress)?;
    if is_complete(&dir) {
        return Ok(dir);
    }
    let reason = format!("{} lacks a file that its index names", dir.display());
    Err(HubError::Unusable { repo, reason })
}

#[cfg(not(feature = "hub"))]
fn fetch(repo: Repo, on_progress: impl Fn(PullProgress)) -> Result<PathBuf, HubError> {
    drop(on_progress);
    let cache = cache_dir();
    Err(if is_offline() {
        HubError::Offline { repo, cache }
    } else {
        HubError::NotBuilt { repo, cache }
    })
}

impl FromStr for Repo {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let (id, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let is_part = |part: &str| {
            part.starts_with(|first: char| first.is_ascii_alphanumeric())
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
                && !part.contains("..")
        };
        let valid = id.split('/').count() == 2
            && id.split('/').all(is_part)
            && revision.split('/').all(is_part);
        if !valid {
            return Err(HubError::Name(text.to_owned()));
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.id)?;
        if self.revision == DEFAULT_REVISION {
            Ok(())
        } else {
            write!(formatter, "@{}", self.revision)
        }
    }
}

/// The repository's folder in the cache, if all that a model needs is there.
fn cached(repo: &Repo) -> Option<PathBuf> {
    let dir = cache_dir().join(format!("models--{}", repo.id.replace('/', "--")));
    let is_commit =
        repo.revision.len() == 40 && repo.revision.bytes().all(|b| b.is_ascii_hexdigit());
    let commit = if is_commit {
        repo.revision.clone()
    } else {
        fs::read_to_string(dir.join("refs").join(&repo.revision)).ok()?
    };
    let snapshot = dir.join("snapshots").join(commit.trim());
    is_complete(&snapshot).then_some(snapshot)
}

/// Where the Hub's programs keep what they download: `HF_HUB_CACHE`, else `hub` in `HF_HOME`.
fn cache_dir() -> PathBuf {
    let variable =
        |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    cache.unwrap_or_else(|| {
        let home = || variable("HOME").unwrap_or_else(env::temp_dir).join(".cache");
        let base = || variable("XDG_CACHE_HOME").unwrap_or_else(home).join("huggingface");
        variable("HF_HOME").unwrap_or_else(base).join("hub")
    })
}

/// Whether the user forbids requests to the Hub.
fn is_offline() -> bool {
    let value = env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    ["1", "true", "yes", "on"].contains(&value.as_str())
}

/// Whether a folder has every file that loading it asks for. An adapter is complete without a base.
fn is_complete(dir: &Path) -> bool {
    #[derive(Deserialize)]
    struct ShardIndex {
        weight_map: BTreeMap<String, String>,
    }
    let has = |name: &str| dir.join(name).is_file();
    let has_shards = || {
        let text = fs::read_to_string(dir.join(WEIGHTS_INDEX)).ok()?;
        let index: ShardIndex = serde_json::from_str(&text).ok()?;
        Some(index.weight_map.values().all(|shard| has(shard)))
    };
    let is_adapter = has("adapter_config.json") && has("adapter_model.safetensors");
    is_adapter
        || (has("config.json")
            && has("tokenizer.json")
            && (has(SINGLE_WEIGHTS) || has_shards().unwrap_or(false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_on_the_hub_has_an_owner_and_perhaps_a_revision() {
        let repo: Repo = "Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1".parse().unwrap();
        assert_eq!(
            (repo.id.as_str(), repo.revision.as_str()),
            ("Qwen/Qwen2.5-0.5B-Instruct", "refs/pr/1")
        );
        assert_eq!(repo.to_string(), "Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1");
        let repo: Repo = "owner/name".parse().unwrap();
        assert_eq!((repo.revision.as_str(), repo.to_string().as_str()), ("main", "owner/name"));
        let names = "name /name owner/ a/b/c ./name ../name owner/.. owner/na!me owner/name@ \
                          owner/name@../x owner/name@a//b owner/name@a..b ~/name";
        for text in names.split_whitespace().chain(["", "owner/na me"]) {
            assert!(text.parse::<Repo>().is_err(), "{text}");
        }
    }
}
