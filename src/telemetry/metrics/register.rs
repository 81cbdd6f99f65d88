//! How metrics are made and registered.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};
use strum::VariantArray;

use crate::close::{Endpoint, StatusClass};

/// Makes metrics whose every label value exists from the start.
pub(crate) struct Maker<'a>(pub(crate) &'a Registry);

impl Maker<'_> {
    pub(crate) fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        let counter = IntCounter::new(name, help)?;
        self.0.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    pub(crate) fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
        for value in values {
            counters.with_label_values(&[value]);
        }
        self.0.register(Box::new(counters.clone()))?;
        Ok(counters)
    }

    pub(crate) fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        let gauge = IntGauge::new(name, help)?;
        self.0.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    /// A gauge whose value is not known yet.
    pub(crate) fn unknown(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(f64::NAN);
        self.0.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    /// The same, by endpoint group.
    pub(crate) fn unknowns(&self, name: &str, help: &str) -> prometheus::Result<GaugeVec> {
        let gauges = GaugeVec::new(Opts::new(name, help), &["endpoint"])?;
        for endpoint in Endpoint::VARIANTS {
            gauges.with_label_values(&[endpoint.label()]).set(f64::NAN);
        }
        self.0.register(Box::new(gauges.clone()))?;
        Ok(gauges)
    }

    pub(crate) fn gauges(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> prometheus::Result<IntGaugeVec> {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
        for value in values {
            gauges.with_label_values(&[value]);
        }
        self.0.register(Box::new(gauges.clone()))?;
        Ok(gauges)
    }

    pub(crate) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
        self.0.register(Box::new(histogram.clone()))?;
        Ok(histogram)
    }

    pub(crate) fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> prometheus::Result<HistogramVec> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let histograms = HistogramVec::new(options, &["endpoint"])?;
        for endpoint in Endpoint::VARIANTS {
            histograms.with_label_values(&[endpoint.label()]);
        }
        self.0.register(Box::new(histograms.clone()))?;
        Ok(histograms)
    }

    pub(crate) fn requests(&self) -> prometheus::Result<IntCounterVec> {
        let options =
            Opts::new("close_requests_total", "Calls to Close by endpoint group and how they ended");
        let requests = IntCounterVec::new(options, &["endpoint", "status"])?;
        for endpoint in Endpoint::VARIANTS {
            for status in StatusClass::VARIANTS {
                requests.with_label_values(&[endpoint.label(), status.label()]);
            }
        }
        self.0.register(Box::new(requests.clone()))?;
        Ok(requests)
    }

    pub(crate) fn build_info(&self) -> prometheus::Result<()> {
        let options = Opts::new("build_info", "1, labelled with the version and the commit of this build");
        let info = IntGaugeVec::new(options, &["version", "commit"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION"), env!("CLOSE_SYNC_COMMIT")]).set(1);
        self.0.register(Box::new(info))
    }
}
