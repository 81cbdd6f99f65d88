//! Notifies systemd by the protocol of `sd_notify(3)`. Without a service manager it does nothing.
//!
//! The worker is ready once it supervises its destinations: it serves HTTP, handles signals and keeps trying to connect.
//! An unavailable RabbitMQ or Close is not a failed start, because a restart would not help. The status line shows it.
//!
//! Watchdog notifications come from the supervisor's loop. They stop when that loop, or the runtime that runs it, hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::http::registry::Readyz;

/// The connection to the service manager, if there is one.
pub(super) struct SystemdNotifier {
    ticks: Interval,
    watches: bool,
    /// The last status that was sent.
    status: String,
    /// The last notification failed. Only the first failure is logged.
    failing: bool,
}

/// The longest interval between status updates.
const INTERVAL: Duration = Duration::from_secs(5);

impl SystemdNotifier {
    pub(super) fn new() -> Self {
        let watchdog = sd_notify::watchdog_enabled();
        // Half of what it allows, as its manual advises.
        let period = watchdog.map_or(INTERVAL, |limit| limit / 2).clamp(Duration::from_millis(1), INTERVAL);
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ticks, watches: watchdog.is_some(), status: String::new(), failing: false }
    }

    /// Waits until the next notification is due.
    pub(super) async fn tick(&mut self) {
        self.ticks.tick().await;
    }

    /// Sends the watchdog notification, and the status if it changed.
    pub(super) fn alive(&mut self, answer: &Readyz) {
        if self.watches {
            self.notify(&[NotifyState::Watchdog]);
        }
        let status = answer.to_string();
        if status != self.status {
            self.notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// The worker runs, or a reload is complete.
    pub(super) fn ready(&mut self) {
        self.notify(&[NotifyState::Ready]);
    }

    /// A reload began. systemd needs the time since version 253.
    pub(super) fn reloading(&mut self) {
        let began = NotifyState::monotonic_usec_now().ok();
        let states: Vec<_> = std::iter::once(NotifyState::Reloading).chain(began).collect();
        self.notify(&states);
    }

    /// A shutdown began. Messages in progress are finished.
    pub(super) fn stopping(&mut self) {
        self.notify(&[NotifyState::Stopping]);
    }

    fn notify(&mut self, states: &[NotifyState<'_>]) {
        let result = sd_notify::notify(states);
        if let Err(error) = &result
            && !self.failing
        {
            tracing::warn!(%error, "cannot notify the service manager (NOTIFY_SOCKET)");
        }
        self.failing = result.is_err();
    }
}
