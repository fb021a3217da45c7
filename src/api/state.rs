//! What every handler shares, and how far the server is on its way out.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Semaphore, watch};

use super::{auth::ApiKeys, error::ApiError, jail::AdapterRoots, metrics_page::MetricsPage};
use crate::adapters::AdapterRegistry;
use crate::engine::EngineHandle;
use crate::jobs::{Service, unix_seconds};
use crate::text::{ChatTemplate, Tokenizer};

/// What the operator decided.
#[derive(Clone)]
pub struct ServerConfig {
    /// The base model's id.
    pub model_name: String,
    /// Where the base model came from, as `/v1/models` shows it.
    pub model_root: String,
    /// What tells the base model from others in `system_fingerprint`, hex.
    pub base_fingerprint: String,
    /// Tokens that end an answer; their text is never shown.
    pub eos_token_ids: Vec<u32>,
    /// Who may ask.
    pub keys: ApiKeys,
    /// Whether only programs on this machine are meant to ask; then web pages are kept out.
    pub local_only: bool,
    /// Where adapters may be loaded from.
    pub adapter_roots: AdapterRoots,
    /// How long a shutdown waits for running requests.
    pub shutdown_timeout: Duration,
}

/// What the handlers work with.
#[derive(Clone)]
pub struct Services {
    /// Runs requests.
    pub engine: EngineHandle,
    /// Names of adapters.
    pub registry: Arc<AdapterRegistry>,
    /// The base model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The base model's chat template.
    pub template: Arc<ChatTemplate>,
    /// The fine-tuning service, where the server has a data folder.
    pub jobs: Option<Arc<Service>>,
}

/// The server's state.
pub struct AppState {
    pub(crate) config: ServerConfig,
    pub(crate) engine: EngineHandle,
    pub(crate) registry: Arc<AdapterRegistry>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Arc<ChatTemplate>,
    jobs: Option<Arc<Service>>,
    pub(crate) metrics: MetricsPage,
    /// Start, in unix seconds.
    pub(crate) started_at: u64,
    /// One permit for each request whose text is being worked on; bounds memory and threads.
    pub(crate) door: Arc<Semaphore>,
    phase: watch::Sender<Phase>,
    /// Names that were unloaded by request: their folders do not load themselves again.
    detached: Mutex<HashSet<String>>,
}

/// How far the server is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Takes requests.
    Serving,
    /// Finishes what it has taken.
    Draining,
    /// Ends what did not finish in time.
    Aborting,
}

/// A request that a shutdown waits for.
pub(crate) struct InFlight(watch::Receiver<Phase>);

impl InFlight {
    /// To watch the phase from within the request.
    pub(crate) fn phase(&self) -> watch::Receiver<Phase> {
        self.0.clone()
    }
}

impl AppState {
    /// A state that takes requests.
    #[must_use]
    pub fn new(config: ServerConfig, services: Services) -> Arc<Self> {
        let limits = services.engine.config();
        let door = Arc::new(Semaphore::new(limits.max_queue + limits.max_num_seqs));
        Arc::new(Self {
            config,
            engine: services.engine,
            registry: services.registry,
            tokenizer: services.tokenizer,
            template: services.template,
            jobs: services.jobs,
            metrics: MetricsPage::default(),
            started_at: unix_seconds(),
            door,
            phase: watch::Sender::new(Phase::Serving),
            detached: Mutex::default(),
        })
    }

    /// What the operator decided.
    #[must_use]
    pub fn config(&self) -> &ServerConfig {
        &self.config
    }

    /// Names of adapters.
    #[must_use]
    pub fn registry(&self) -> &AdapterRegistry {
        &self.registry
    }

    /// The fine-tuning service.
    ///
    /// # Errors
    /// 403 where the server has none.
    pub(crate) fn jobs(&self) -> Result<&Arc<Service>, ApiError> {
        self.jobs.as_ref().ok_or_else(|| {
            let message = "files and fine-tuning are off: start the server with --data-dir DIR";
            ApiError::Forbidden(message.to_owned())
        })
    }

    /// Takes a request in, unless the server is on its way out.
    pub(crate) fn admit(&self) -> Result<InFlight, ApiError> {
        // Subscribed first, so that a drain that begins now already waits for this request.
        let in_flight = InFlight(self.phase.subscribe());
        if *in_flight.0.borrow() == Phase::Serving {
            Ok(in_flight)
        } else {
            Err(ApiError::Draining)
        }
    }

    /// Whether requests are refused for good.
    pub(crate) fn is_draining(&self) -> bool {
        *self.phase.borrow() != Phase::Serving
    }

    /// Refuses requests from now on and returns when the last running one has ended; after the
    /// shutdown timeout, those left end with an error.
    pub(crate) async fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
        let idle = self.phase.closed();
        if tokio::time::timeout(self.config.shutdown_timeout, idle).await.is_err() {
            tracing::warn!("the shutdown timeout is over; ending the requests that still run");
            self.phase.send_replace(Phase::Aborting);
        }
        self.engine.drain();
    }

    /// Ends the fine-tuning service; its running jobs are left with a checkpoint.
    pub(crate) async fn stop_jobs(&self) {
        if let Some(jobs) = self.jobs.clone()
            && let Err(error) = tokio::task::spawn_blocking(move || jobs.stop()).await
        {
            tracing::error!("the fine-tuning service did not end well: {error}");
        }
    }

    pub(crate) fn is_detached(&self, name: &str) -> bool {
        self.detached_names().contains(name)
    }

    pub(crate) fn set_detached(&self, name: &str, detached: bool) {
        let mut names = self.detached_names();
        if detached {
            names.insert(name.to_owned());
        } else {
            names.remove(name);
        }
    }

    fn detached_names(&self) -> MutexGuard<'_, HashSet<String>> {
        self.detached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
