//! One Close organization, from the first look at it until it is told to stop.
//!
//! One session follows the other: a lost broker is reconnected to with growing, jittered pauses and without end;
//! while Close cannot be worked with there is no session at all, and Close is probed instead, so that messages
//! wait in the queue without being touched (`design.md` P5). After that, the first session begins with a few
//! messages at a time: Close is on trial, and what proves that it works is a message that succeeds.
//!
//! Settings that come while it runs are taken over if they are others and Close agrees to them: what is in hand is
//! finished by the old ones first. Otherwise the old ones stay; the same ones again disturb nothing.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::amqp::{self, BrokerError, topology};
use crate::close::Client;
use crate::config::Destination;
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::{End, Session, SessionStats};
use crate::domain::mapping::{Key, Mapping, Rules};
use crate::http::registry::{DestinationHandle, DestinationRuntime};
use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::supervisor::RunError;
use crate::supervisor::pause::Pause;
use crate::sync::preflight::{self, PreflightError};
use crate::sync::{Worker, log_mapping_problems};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::{State, Status};

/// Keeps a Close organization in step until `shutdown`, with the settings that `reloads` brings once they work. Those
/// that are worked by can be seen in `in_force`.
pub(super) async fn run(
    in_force: watch::Sender<Destination>,
    reloads: mpsc::UnboundedReceiver<Destination>,
    seat: DestinationHandle,
    shutdown: &CancellationToken,
) -> Result<SessionStats, RunError> {
    let DestinationHandle { metrics, status, runtime: access } = seat;
    let settings = in_force.borrow().clone();
    access.set_settings(Arc::new(settings.amqp.clone()));
    let mut supervisor = SessionLoop::new(status.clone(), metrics.clone(), access);
    // Before anything about Close: producers may publish from now on, whatever state Close is in.
    let declared = async {
        match settings.amqp.topology {
            amqp::TopologyMode::Declare => prepare(&settings.amqp).await,
            // Nothing for us to do; the first session looks.
            amqp::TopologyMode::Check => Ok(()),
        }
    };
    match shutdown.run_until_cancelled(declared).await {
        Some(Err(error)) if error.is_lasting() => {
            metrics.set_broker_trouble(Some(error.trouble()));
            return Err(RunError::Configuration(error.to_string()));
        }
        // The first session tries again, once Close agrees: it is the same incident.
        Some(Err(error)) => supervisor.tell(&error),
        Some(Ok(())) | None => {}
    }
    let preflight = Preflight {
        client: client(&settings, &metrics)?,
        rules: settings.rules.clone(),
        api_key: settings.api_key_setting(),
        status: status.clone(),
        metrics: metrics.clone(),
    };
    let mut reloads = Reloads { settings: reloads, checking: None, in_force, metrics: metrics.clone() };
    let assembly = tokio::select! {
        mapping = preflight.mapping(shutdown) => match mapping? {
            Some(mapping) => Assembly { client: preflight.client, settings, mapping },
            None => return Ok(SessionStats::default()),
        },
        // Mended while we wait for Close.
        assembly = reloads.next() => assembly,
    };
    metrics.paused(None);
    supervisor.run(assembly, reloads, shutdown).await
}

fn client(settings: &Destination, metrics: &Metrics) -> anyhow::Result<Client> {
    let metrics = metrics.clone();
    Client::new(settings.close.clone(), move |call| metrics.request_done(call))
        .context("TLS cannot be set up: are CA certificates installed (Debian: ca-certificates)?")
}

/// The checks at start.
struct Preflight {
    client: Client,
    rules: Rules,
    /// How its operator finds the setting.
    api_key: String,
    status: Status,
    metrics: Metrics,
}

impl Preflight {
    /// A mistake in the configuration is an error; what may pass is waited for. `None` when asked to stop
    /// meanwhile.
    async fn mapping(&self, shutdown: &CancellationToken) -> Result<Option<Mapping>, RunError> {
        let asks = "asks Close whether it can be worked with, as soon as its rate limits allow";
        self.status.set(State::Connecting(None), Some(asks.to_owned()));
        // Close may make the checks wait; being asked to stop ends them.
        let check = || preflight::run(&self.client, &self.rules);
        let cause = match shutdown.run_until_cancelled(check()).await {
            None => return Ok(None),
            Some(Ok(ready)) => {
                tracing::info!(organization = ready.organization, "Close accepts the API key");
                log_mapping_problems(&ready.mapping);
                return Ok(Some(ready.mapping));
            }
            Some(Err(obstacles)) => cause_or_refusal(&obstacles, &self.api_key)?,
        };
        let probe = || async {
            let ready = check().await?;
            log_mapping_problems(&ready.mapping);
            Ok(ready.mapping)
        };
        let pause = Pause { status: &self.status, metrics: &self.metrics, again: false, last_failure: None };
        let found = pause.until(cause, &mut Backoff::probe(), probe, shutdown).await;
        Ok(found.map(|(_, mapping)| mapping))
    }
}

fn cause_or_refusal(obstacles: &[PreflightError], api_key: &str) -> Result<PauseCause, RunError> {
    let lines: Vec<_> = obstacles.iter().map(|obstacle| obstacle.with_remedy(api_key)).collect();
    tracing::error!(obstacle = lines.join("; "), "Close cannot be worked with");
    match obstacles.first().and_then(PreflightError::pause_cause) {
        None => Ok(PauseCause::Unreachable),
        Some(cause @ (PauseCause::Unreachable | PauseCause::Failing | PauseCause::PlanLimit)) => Ok(cause),
        Some(PauseCause::LookupField | PauseCause::Unauthorized | PauseCause::Forbidden) => {
            Err(RunError::Configuration(lines.join("\n")))
        }
    }
}

/// Settings that Close agrees to, with what was made of them.
struct Assembly {
    settings: Destination,
    client: Client,
    mapping: Mapping,
}

/// What may be missed in what was taken over.
const NOT_YET: &str = "`http`, `log` and `otel` change with the next start only, and the environment still wins \
                       over the file";

/// How long new settings may take to be checked.
const CHECK_TIME: Duration = Duration::from_secs(30);

/// New settings, and how it is found out whether they work.
struct Reloads {
    settings: mpsc::UnboundedReceiver<Destination>,
    /// Those being checked: what was cut short begins again.
    checking: Option<Destination>,
    /// Those that are worked by. What of the broker they have in common with new ones is declared, and not asked
    /// again: it may be away just now.
    in_force: watch::Sender<Destination>,
    metrics: Metrics,
}

impl Reloads {
    /// Waits for other settings that work. What is wrong with them otherwise is told, and the old ones stay in force.
    async fn next(&mut self) -> Assembly {
        loop {
            if self.checking.is_none() {
                self.checking = self.settings.recv().await;
            }
            // Nobody is left who could bring any.
            let Some(settings) = self.checking.clone() else { std::future::pending().await };
            // Compared when their turn has come: those before them may have been taken over, or not.
            if settings == *self.in_force.borrow() {
                self.checking = None;
                tracing::info!(
                    "the configuration was read again and says nothing new: all stays as it is. {NOT_YET}"
                );
                continue;
            }
            let checked = self.check(settings).await;
            self.checking = None;
            match checked {
                Ok(assembly) => {
                    tracing::info!("the configuration was read again and is taken over. {NOT_YET}");
                    return assembly;
                }
                Err(error) => tracing::error!(
                    problem = format!("{error:#}"),
                    "the configuration was read again and cannot be used: the old one stays"
                ),
            }
        }
    }

    async fn check(&self, settings: Destination) -> anyhow::Result<Assembly> {
        let declared = self.in_force.borrow().amqp.clone();
        if !declared.is_same(&settings.amqp) {
            prepare(&settings.amqp).await?;
        }
        let client = client(&settings, &self.metrics)?;
        let asked = tokio::time::timeout(CHECK_TIME, preflight::run(&client, &settings.rules));
        let asked = asked.await.context("Close did not answer in time, or let us wait for rate limits")?;
        let ready = asked.map_err(|obstacles| {
            anyhow::anyhow!(obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        log_mapping_problems(&ready.mapping);
        Ok(Assembly { settings, client, mapping: ready.mapping })
    }
}

/// A session that stood this long was a good one, also without messages.
const STABLE: Duration = Duration::from_mins(1);

/// One session after the other, and what has to be remembered between them.
struct SessionLoop {
    status: Status,
    metrics: Metrics,
    access: DestinationRuntime,
    total: SessionStats,
    reconnects: Backoff,
    probes: Backoff,
    /// The broker was lost, and this has been told.
    lost: bool,
}

impl SessionLoop {
    fn new(status: Status, metrics: Metrics, access: DestinationRuntime) -> Self {
        let (reconnects, probes) = (Backoff::reconnect(), Backoff::probe());
        Self { status, metrics, access, total: SessionStats::default(), reconnects, probes, lost: false }
    }

    /// Works by one configuration after the other.
    async fn run(
        mut self,
        mut assembly: Assembly,
        mut reloads: Reloads,
        shutdown: &CancellationToken,
    ) -> Result<SessionStats, RunError> {
        loop {
            // Only now: until here those before were worked by.
            reloads.in_force.send_replace(assembly.settings.clone());
            let turn = shutdown.child_token();
            let mut working = Box::pin(self.work(assembly, &turn));
            let next = tokio::select! {
                ended = &mut working => { ended?; None }
                next = reloads.next() => {
                    turn.cancel();
                    working.await?;
                    Some(next)
                }
            };
            match next {
                Some(next) => assembly = next,
                None => break,
            }
        }
        self.status.set(State::Stopping, None);
        Ok(self.total)
    }

    /// Works until `turn` is over.
    async fn work(&mut self, assembly: Assembly, turn: &CancellationToken) -> Result<(), RunError> {
        let Assembly { settings, client, mapping } = assembly;
        self.metrics.set_close_client(Some(client.clone()));
        self.metrics.set_config_hash(&settings.hash);
        let worker = Worker::new(settings.worker, &settings.rules, mapping, client, self.metrics.clone());
        let amqp = Arc::new(settings.amqp);
        self.access.set_settings(Arc::clone(&amqp));
        self.access.set_worker(worker.clone());
        let refresh = refresh(worker.clone(), settings.schema_refresh);
        let refresh = AbortOnDrop(tokio::spawn(refresh.in_current_span()));
        let mut session = Session {
            destination: settings.name.map(Into::into),
            settings: amqp,
            worker,
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            concurrency: settings.concurrency,
            grace: settings.grace,
            on_trial: None,
        };
        let mut detours = DelayedMessages::default();
        while !turn.is_cancelled() {
            self.session(&mut session, &mut detours, turn).await?;
        }
        drop(refresh);
        Ok(())
    }

    /// One line per incident, not per try.
    fn tell(&mut self, error: &BrokerError) {
        if self.lost {
            tracing::debug!(%error, "still no connection to RabbitMQ");
        } else {
            tracing::warn!(%error, "reconnecting to RabbitMQ until it works");
        }
        self.lost = true;
    }

    /// One session, and what has to pass before the next.
    async fn session(
        &mut self,
        session: &mut Session,
        detours: &mut DelayedMessages<Key>,
        turn: &CancellationToken,
    ) -> Result<(), RunError> {
        let began = Instant::now();
        let (end, report) = session.run(detours, turn).await;
        self.total += report;
        if report.breaker_closed {
            self.probes.reset();
            session.on_trial = None;
            // The log said that it was connected.
            self.lost = false;
        }
        if report.settled > 0 || began.elapsed() > STABLE {
            // It worked, or stood by, for a while.
            self.reconnects.reset();
        }
        match end {
            End::Stopped => {}
            End::Paused(cause) => {
                let probe = || session.worker.refresh_mapping();
                let again = session.on_trial.is_some();
                let last_failure = session.worker.last_failure();
                let pause = Pause { status: &self.status, metrics: &self.metrics, again, last_failure };
                if let Some((cause, ())) = pause.until(cause, &mut self.probes, probe, turn).await {
                    session.worker.half_open_breaker();
                    session.on_trial = Some(cause);
                }
            }
            End::Lost(error) if error.is_lasting() => {
                self.metrics.set_broker_trouble(Some(error.trouble()));
                return Err(RunError::Configuration(error.to_string()));
            }
            End::Lost(error) => {
                self.status.set(State::Connecting(Some(error.trouble())), Some(error.to_string()));
                self.metrics.set_broker_trouble(Some(error.trouble()));
                let wait = self.reconnects.next_delay().unwrap_or_default();
                self.tell(&error);
                turn.run_until_cancelled(tokio::time::sleep(wait)).await;
            }
        }
        Ok(())
    }
}

/// Looks at the fields in Close from time to time.
async fn refresh(worker: Worker, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if let Err(obstacles) = worker.refresh_mapping().await {
            // The next message that meets it pauses consumption; this is no message's business.
            let obstacle = obstacles.first().map(ToString::to_string);
            tracing::warn!(obstacle, "the fields in Close cannot be looked at; the mapping stays as it is");
        }
    }
}

/// A task that ends with whoever wanted it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn prepare(settings: &amqp::Settings) -> Result<(), BrokerError> {
    let connection = settings.connect("close-sync prepare").await?;
    amqp::with_timeout(topology::prepare(&connection, settings)).await?;
    amqp::disconnect(&connection).await;
    Ok(())
}
