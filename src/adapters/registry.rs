//! Name -> current version of an adapter. Loads of one name queue, loads of different names run side
//! by side, and readers never wait for a file: they see the old version or the new.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{AdapterError, LoadLimits, LoraAdapter, check_base};
use crate::model::{Decoder, ModelConfig};
use crate::ops::lora_dtype::LoraDtype;
use crate::text::{TextError, Tokenizer};

/// Longest name, in bytes.
const NAME_BYTES_LIMIT: usize = 256;

/// An immutable version of a named adapter.
#[derive(Debug)]
pub struct AdapterVersion {
    /// The name that requests use.
    pub name: String,
    /// Counter per name: 1, 2, ... It goes on after an unload.
    pub version: u64,
    /// The weights.
    pub adapter: Arc<LoraAdapter>,
    /// The tokenizer of its folder, if it has tokens of its own: texts for it are split by this one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The folder that it was read from; its content may have changed since.
    pub path: PathBuf,
    /// Unix seconds.
    pub loaded_at: u64,
}

impl AdapterVersion {
    /// The tokenizer for texts to and from `adapter`: its own, or `base`.
    #[must_use]
    pub fn tokenizer_of<'a>(
        adapter: Option<&'a Arc<Self>>,
        base: &'a Arc<Tokenizer>,
    ) -> &'a Arc<Tokenizer> {
        adapter.and_then(|version| version.tokenizer.as_ref()).unwrap_or(base)
    }
}

/// Name -> current version. Shared by the HTTP floor; a request resolves its name once and keeps
/// the `Arc`, so a replaced version lives until its last request has ended.
pub struct AdapterRegistry {
    model: ModelConfig,
    base: Base,
    limits: LoadLimits,
    dtype: LoraDtype,
    current: RwLock<BTreeMap<String, Arc<AdapterVersion>>>,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
}

/// What adapters must have been made for.
enum Base {
    /// Anything of the right shape.
    Any,
    Fingerprint(String),
    /// Hashing it takes a moment, so only where a card names a base.
    Decoder(Arc<Decoder>),
}

/// What a name keeps beyond its versions: the number of the last one, locked while one is loaded.
#[derive(Default)]
struct Slot {
    last_version: Mutex<u64>,
}

impl AdapterRegistry {
    /// An empty registry for adapters of `model`. Without a fingerprint only shapes are checked.
    #[must_use]
    pub fn new(model: ModelConfig) -> Self {
        Self {
            model,
            base: Base::Any,
            limits: LoadLimits::default(),
            dtype: LoraDtype::Auto,
            current: RwLock::default(),
            slots: Mutex::default(),
        }
    }

    /// Refuses adapters whose card was written for a base with another fingerprint.
    #[must_use]
    pub fn with_base_fingerprint(mut self, fingerprint: &str) -> Self {
        self.base = Base::Fingerprint(fingerprint.to_owned());
        self
    }

    /// The same for the base itself, whose fingerprint is computed once a card names one, and for which
    /// adapters are prepared while they are loaded rather than at their first request.
    #[must_use]
    pub fn with_base(mut self, decoder: &Arc<Decoder>) -> Self {
        self.base = Base::Decoder(Arc::clone(decoder));
        self
    }

    /// Holds A and B of what is loaded as `dtype` has it. Tables and DoRA's magnitudes stay as they are.
    #[must_use]
    pub fn with_dtype(mut self, dtype: LoraDtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Other limits than the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: LoadLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Reads, checks and publishes; blocking. Returns the version and whether it is new: with
    /// `replace`, the current version's digest again changes nothing.
    ///
    /// # Errors
    /// `InvalidName`, `AlreadyLoaded` without `replace`, and every reason to refuse the folder. The
    /// old version, if there is one, goes on serving.
    pub fn load(
        &self,
        name: &str,
        dir: &Path,
        replace: bool,
    ) -> Result<(Arc<AdapterVersion>, bool), AdapterError> {
        check_name(name)?;
        let slot = self.slot(name);
        let loaded = {
            let mut last_version = lock(&slot.last_version);
            self.load_next(name, dir, replace, &mut last_version)
        };
        if loaded.is_err() {
            self.forget_unused(name, &slot);
        }
        loaded
    }

    /// Reads and checks a folder as [`load`](Self::load) does, but publishes nothing: only the caller
    /// has this version, whose number is 0. Blocking.
    ///
    /// # Errors
    /// Every reason to refuse the folder.
    pub fn read(&self, name: &str, dir: &Path) -> Result<AdapterVersion, AdapterError> {
        match &self.base {
            Base::Any => {}
            Base::Fingerprint(fingerprint) => check_base(dir, || fingerprint)?,
            Base::Decoder(decoder) => check_base(dir, || decoder.fingerprint())?,
        }
        let adapter = LoraAdapter::read_as(dir, &self.model, self.dtype, &self.limits)?;
        if let Base::Decoder(decoder) = &self.base {
            adapter.prepare(decoder)?;
        }
        Ok(AdapterVersion {
            tokenizer: own_tokenizer(&adapter, dir)?,
            name: name.to_owned(),
            version: 0,
            adapter: Arc::new(adapter),
            path: dir.to_owned(),
            loaded_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
        })
    }

    /// Takes the name away; requests that hold the version finish on it. `None` if there is no such
    /// name.
    pub fn unload(&self, name: &str) -> Option<Arc<AdapterVersion>> {
        self.current.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// The current version of `name`.
    pub fn get(&self, name: &str) -> Option<Arc<AdapterVersion>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// The current versions, by name.
    pub fn list(&self) -> Vec<Arc<AdapterVersion>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn load_next(
        &self,
        name: &str,
        dir: &Path,
        replace: bool,
        last_version: &mut u64,
    ) -> Result<(Arc<AdapterVersion>, bool), AdapterError> {
        if !replace && self.get(name).is_some() {
            return Err(AdapterError::AlreadyLoaded { name: name.to_owned() });
        }
        let loaded = self.read(name, dir)?;
        // Asked after the read: an unload may have come meanwhile.
        if let Some(current) = self.get(name)
            && current.adapter.digest() == loaded.adapter.digest()
        {
            return Ok((current, false));
        }
        *last_version += 1;
        let version = Arc::new(AdapterVersion { version: *last_version, ..loaded });
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        current.insert(name.to_owned(), Arc::clone(&version));
        Ok((version, true))
    }

    fn slot(&self, name: &str) -> Arc<Slot> {
        Arc::clone(lock(&self.slots).entry(name.to_owned()).or_default())
    }

    /// Failed loads of ever new names must not grow the map.
    fn forget_unused(&self, name: &str, slot: &Arc<Slot>) {
        let mut slots = lock(&self.slots);
        // The map and `slot` are the only owners, so nobody is loading and nobody can begin to.
        if Arc::strong_count(slot) == 2 && *lock(&slot.last_version) == 0 {
            slots.remove(name);
        }
    }
}

/// The tokenizer beside an adapter that has rows of the embedding; one for the base is not held twice.
fn own_tokenizer(
    adapter: &LoraAdapter,
    dir: &Path,
) -> Result<Option<Arc<Tokenizer>>, AdapterError> {
    if !adapter.has_own_tokens() || !dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    let malformed = |error: TextError| AdapterError::MalformedFile {
        path: dir.to_owned(),
        detail: error.to_string(),
    };
    Ok(Some(Arc::new(Tokenizer::from_dir(dir).map_err(malformed)?)))
}

fn check_name(name: &str) -> Result<(), AdapterError> {
    let refuse = |expected| Err(AdapterError::InvalidName { name: name.to_owned(), expected });
    if name.is_empty() {
        return refuse("expected at least one character");
    }
    if name.len() > NAME_BYTES_LIMIT {
        return refuse("expected at most 256 bytes");
    }
    if name.contains('@') {
        return refuse("expected no '@', which separates a version");
    }
    if name.contains(char::is_control) {
        return refuse("expected no control characters");
    }
    Ok(())
}

/// A panic elsewhere does not make the data wrong: it is replaced whole or not at all.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
