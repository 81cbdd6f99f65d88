//! What libraries may log, whatever `RUST_LOG` says.
//!
//! lapin logs whole frames, at `trace` and some at `warn`: the password of the broker and the bodies of messages, as
//! lists of bytes. Others log URLs and headers. So a library logs at most what is known to contain neither secrets nor
//! personal data. One that is not listed here logs at most `info`.

use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

pub(super) fn library_levels() -> Targets {
    Targets::new().with_default(LevelFilter::INFO).with_targets([
        ("close_sync", LevelFilter::TRACE),
        ("lapin", LevelFilter::ERROR),
        // Useful to find out why a connection fails.
        ("hyper", LevelFilter::DEBUG),
        ("reqwest", LevelFilter::DEBUG),
        ("rustls", LevelFilter::DEBUG),
    ])
}

/// The directives of a filter that ask for more than a library may log.
pub(super) fn limited(filter: &str) -> Vec<&str> {
    let levels = library_levels();
    let is_limited = |directive: &&str| {
        let (target, level) =
            directive.rsplit_once('=').unwrap_or_else(|| match directive.parse::<Level>() {
                Ok(_) => ("", directive),
                // A target alone means everything of it.
                Err(_) => (directive, "trace"),
            });
        let target = target.split('[').next().unwrap_or_default().trim();
        let level = level.trim().parse::<LevelFilter>().ok().and_then(LevelFilter::into_level);
        level.is_some_and(|level| !levels.would_enable(target, &level))
    };
    filter.split(',').map(str::trim).filter(|directive| !directive.is_empty()).filter(is_limited).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_never_logs_more_than_is_known_to_be_harmless() {
        let levels = library_levels();
        let most = |target: &str| {
            let all = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
            all.into_iter().rfind(|level| levels.would_enable(target, level))
        };
        for (target, level) in [
            ("close_sync::consumer", Level::TRACE),
            ("lapin::channel", Level::ERROR),
            ("amq_protocol_tcp", Level::INFO),
            ("hyper_util::client", Level::DEBUG),
            ("reqwest::connect", Level::DEBUG),
            ("h2::codec", Level::INFO),
            ("a_library_of_tomorrow", Level::INFO),
        ] {
            assert_eq!(most(target), Some(level), "{target}");
        }
    }

    #[test]
    fn only_directives_that_ask_for_too_much_are_limited() {
        for (filter, expected) in [
            ("info,lapin=off", &[][..]),
            ("info,lapin=off,close_sync=trace", &[]),
            ("trace", &["trace"]),
            ("DEBUG", &["DEBUG"]),
            ("info, lapin=trace ,hyper=debug", &["lapin=trace"]),
            ("lapin", &["lapin"]),
            ("close_sync", &[]),
            ("lapin::channel[open{id=1}]=debug", &["lapin::channel[open{id=1}]=debug"]),
            ("[settle]=trace", &["[settle]=trace"]),
            ("reqwest=trace,rustls=off,nonsense=", &["reqwest=trace"]),
            ("", &[]),
        ] {
            assert_eq!(limited(filter), expected, "{filter}");
        }
    }
}
