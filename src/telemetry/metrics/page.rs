//! The metrics of the operator's page. They belong to the process, not to a destination.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, Opts};
use strum::{IntoStaticStr, VariantArray};

/// Why a guess of the token was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Refusal {
    WrongToken,
    /// Refused without comparing it, because of earlier wrong guesses.
    Throttled,
}

/// Clones share the counters.
#[derive(Clone)]
pub struct PageMetrics(prometheus::IntCounterVec);

impl Default for PageMetrics {
    #[expect(clippy::expect_used, reason = "the name and the label are constants")]
    fn default() -> Self {
        let opts = Opts::new(
            "close_sync_page_sign_ins_refused_total",
            "Refused guesses of the token of the operator's page",
        );
        let counters = prometheus::IntCounterVec::new(opts, &["reason"]).expect("a valid metric");
        let metrics = Self(counters);
        for reason in Refusal::VARIANTS {
            metrics.counter(*reason);
        }
        metrics
    }
}

impl PageMetrics {
    /// A guess of the token was refused.
    pub fn refused(&self, reason: Refusal) {
        self.counter(reason).inc();
    }

    fn counter(&self, reason: Refusal) -> IntCounter {
        self.0.with_label_values(&[<&str>::from(reason)])
    }

    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.0.collect()
    }
}
