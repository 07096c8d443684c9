//! tgb-webhook
mod certificates;
mod conversion;
mod server;
fn main() {}
