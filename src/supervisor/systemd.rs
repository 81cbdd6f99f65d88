//! What a service manager is told: systemd, by the protocol of `sd_notify(3)`.
//!
//! The worker is ready once it supervises its destinations: it serves HTTP, listens to signals, and tries for as long
//! as it takes. That RabbitMQ or Close is away is no failed start, and starting again would help nobody; what it is
//! doing is its status.
//!
//! A sign of life is due to whoever started it with a watchdog. The loop that supervises gives it, so that there is
//! none when that loop, or the runtime that wakes it up, stands still.
//!
//! Without a service manager, all of this does nothing.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::http::registry::Readyz;

/// The service manager that started the process, if one did.
pub(super) struct SystemdNotifier {
    turns: Interval,
    watches: bool,
    /// What it was told last.
    status: String,
    /// It could not be told, and that was logged.
    deaf: bool,
}

/// How often it is told what the worker is doing, if that has changed.
const EVERY: Duration = Duration::from_secs(5);

impl SystemdNotifier {
    pub(super) fn new() -> Self {
        let watchdog = sd_notify::watchdog_enabled();
        // Half of what it allows, as its manual advises.
        let every = watchdog.map_or(EVERY, |limit| limit / 2).clamp(Duration::from_millis(1), EVERY);
        let mut turns = interval(every);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { turns, watches: watchdog.is_some(), status: String::new(), deaf: false }
    }

    /// Waits until it is time for a sign of life.
    pub(super) async fn turn(&mut self) {
        self.turns.tick().await;
    }

    /// The worker lives, and this is what it does.
    pub(super) fn alive(&mut self, answer: &Readyz) {
        if self.watches {
            self.tell(&[NotifyState::Watchdog]);
        }
        let status = answer.to_string();
        if status != self.status {
            self.tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// The worker serves, for the first time or again after [`SystemdNotifier::reloading`].
    pub(super) fn ready(&mut self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// The configuration is read again. From 253 on, systemd wants to know when that began.
    pub(super) fn reloading(&mut self) {
        let began = NotifyState::monotonic_usec_now().ok();
        let told: Vec<_> = std::iter::once(NotifyState::Reloading).chain(began).collect();
        self.tell(&told);
    }

    /// What is in hand is finished, nothing else is begun.
    pub(super) fn stopping(&mut self) {
        self.tell(&[NotifyState::Stopping]);
    }

    fn tell(&mut self, told: &[NotifyState<'_>]) {
        let result = sd_notify::notify(told);
        if let Err(error) = &result
            && !self.deaf
        {
            tracing::warn!(%error, "the service manager (NOTIFY_SOCKET) cannot be told anything");
        }
        self.deaf = result.is_err();
    }
}
