//! Why a command failed, and the exit code that follows.

use crate::amqp::BrokerError;
use crate::config::Problems;
use crate::supervisor::RunError;
use crate::text::{block, line};

/// A check did not hold.
pub(super) const CHECK_FAILED: u8 = 1;
/// Wrong usage or input, the same code that clap uses.
pub(super) const USAGE: u8 = 2;
/// `EX_UNAVAILABLE` of sysexits.
pub(super) const UNAVAILABLE: u8 = 69;
/// `EX_CONFIG` of sysexits.
pub(super) const CONFIGURATION: u8 = 78;

#[derive(Debug)]
pub(super) enum Failure {
    /// The input or the arguments are wrong.
    Input(String),
    /// Something required is unavailable.
    Unavailable(String),
    /// The configuration cannot work.
    Configuration(String),
    /// The command has printed the failure; only the exit code remains.
    Reported(u8),
}

impl Failure {
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => USAGE,
            Self::Unavailable(_) => UNAVAILABLE,
            Self::Configuration(_) => CONFIGURATION,
            Self::Reported(code) => *code,
        }
    }

    /// The message still to be printed.
    pub(super) fn message(&self) -> Option<&str> {
        match self {
            Self::Input(message) | Self::Unavailable(message) | Self::Configuration(message) => Some(message),
            Self::Reported(_) => None,
        }
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        if let Some((_, message)) = problems.lines().find(|(key, _)| key == "--destination") {
            return Self::Input(line(message));
        }
        Self::Configuration(format!(
            "{problems}\nhint: deploy/docs/settings.md lists every setting; `close-sync check` tests a change"
        ))
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        match error {
            BrokerError::Conflict { .. }
            | BrokerError::TooOld(_)
            | BrokerError::Incomplete(_)
            | BrokerError::MayNotDeclare(_) => Self::Configuration(line(&error.to_string())),
            BrokerError::Unreachable(_) => Self::Unavailable(format!(
                "{}\nhint: start RabbitMQ, or set `amqp.url` (AMQP_URL) to a broker that is running",
                line(&error.to_string())
            )),
            BrokerError::Refused(_)
            | BrokerError::Tls(_)
            | BrokerError::Missing(_)
            | BrokerError::Forbidden(_)
            | BrokerError::Lost(_)
            | BrokerError::StoodStill(_)
            | BrokerError::Cancelled
            | BrokerError::TakenOver
            | BrokerError::Rejected(_)
            | BrokerError::Busy(_)
            | BrokerError::Unroutable { .. }
            | BrokerError::Unconfirmed(_) => Self::Unavailable(line(&error.to_string())),
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Configuration(message) => Self::Configuration(block(&message)),
            RunError::Unavailable(error) => Self::Unavailable(block(&format!("{error:#}"))),
        }
    }
}
