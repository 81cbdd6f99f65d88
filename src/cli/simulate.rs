//! x
use super::Failure;
#[derive(clap::Args)]
pub(super) struct Args {}
pub(super) async fn simulate(_: Args) -> Result<(), Failure> {
    Ok(())
}
