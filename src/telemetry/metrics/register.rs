//! Creates and registers metrics. Every combination of label values exists from the start, so that an alert sees zero
//! instead of no data.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

/// A label with all its values.
#[derive(Clone)]
pub(crate) struct Label {
    name: &'static str,
    values: Vec<&'static str>,
}

/// The label `name` with these values.
pub(crate) fn label(name: &'static str, values: impl IntoIterator<Item = &'static str>) -> Label {
    Label { name, values: values.into_iter().collect() }
}

/// Every combination of the labels' values.
fn combinations(labels: &[Label]) -> Vec<Vec<&'static str>> {
    labels.iter().fold(vec![Vec::new()], |combinations, label| {
        let extend = |values: &Vec<&'static str>| {
            let values = values.clone();
            label.values.iter().map(move |value| [values.as_slice(), &[*value]].concat()).collect::<Vec<_>>()
        };
        combinations.iter().flat_map(extend).collect()
    })
}

fn names(labels: &[Label]) -> Vec<&'static str> {
    labels.iter().map(|label| label.name).collect()
}

/// Registers metrics with the registry of one destination.
pub(crate) struct Registrar<'a>(pub(crate) &'a Registry);

impl Registrar<'_> {
    fn register<M: prometheus::core::Collector + Clone + 'static>(&self, metric: M) -> prometheus::Result<M> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(crate) fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    pub(crate) fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[Label],
    ) -> prometheus::Result<IntCounterVec> {
        let counters = IntCounterVec::new(Opts::new(name, help), &names(labels))?;
        for values in combinations(labels) {
            counters.with_label_values(&values);
        }
        self.register(counters)
    }

    pub(crate) fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    pub(crate) fn gauges(&self, name: &str, help: &str, labels: &[Label]) -> prometheus::Result<IntGaugeVec> {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &names(labels))?;
        for values in combinations(labels) {
            gauges.with_label_values(&values);
        }
        self.register(gauges)
    }

    /// A gauge that is NaN until its value is known.
    pub(crate) fn unknown(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(f64::NAN);
        self.register(gauge)
    }

    /// Gauges that are NaN until their values are known.
    pub(crate) fn unknowns(&self, name: &str, help: &str, labels: &[Label]) -> prometheus::Result<GaugeVec> {
        let gauges = GaugeVec::new(Opts::new(name, help), &names(labels))?;
        for values in combinations(labels) {
            gauges.with_label_values(&values).set(f64::NAN);
        }
        self.register(gauges)
    }

    pub(crate) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }

    pub(crate) fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[Label],
    ) -> prometheus::Result<HistogramVec> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let histograms = HistogramVec::new(options, &names(labels))?;
        for values in combinations(labels) {
            histograms.with_label_values(&values);
        }
        self.register(histograms)
    }
}

/// Declares a struct of metrics, one metric to a line: field, type, name, help, and labels or buckets.
macro_rules! metrics {
    ($($(#[$doc:meta])* $group:ident {
        $($field:ident: $type:ty = $make:ident($name:literal, $help:literal $(, $more:expr)*);)*
    })*) => {
        $($(#[$doc])*
        #[derive(Clone)]
        pub(crate) struct $group { $(pub(crate) $field: $type,)* }

        impl $group {
            pub(crate) fn new(registrar: &Registrar<'_>) -> prometheus::Result<Self> {
                Ok(Self { $($field: registrar.$make($name, $help $(, $more)*)?,)* })
            }
        })*
    };
}
pub(crate) use metrics;
