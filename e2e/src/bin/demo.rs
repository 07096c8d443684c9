//! `make demo`: the product at work, on a control plane and an AWS of its own, in one command. `--once` exits at the end.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tgb_e2e::walkthrough::{self, Fidelity, Screen};
use tgb_e2e::{Aws, Cluster, Options, Output, Result, Settings, Setup, World};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg != "--once") {
        eprintln!("demo: the only argument is --once (make demo ARGS=--once): do everything, then exit");
        return ExitCode::from(2);
    }
    match demo(!args.is_empty()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("demo: {message}");
            ExitCode::FAILURE
        }
    }
}

fn demo(once: bool) -> Result<()> {
    let mut terminal = Terminal { started: Instant::now() };
    terminal.title(
        "A control plane (etcd, Kubernetes 1.37.2, kwok), an AWS, the chart, the webhook and the controller",
    );
    let (cluster, product) = (Options::default(), &Settings::default());
    let world = World::start(&Setup { cluster, product, aws: |_| Aws::awsim() })?;
    let World { cluster, aws, product, .. } = &world;
    terminal.command(&cluster.kubectl(&["get", "nodes"]));
    terminal.command(&cluster.helm(&["list", "--namespace", tgb_e2e::NAMESPACE]));
    walkthrough::run(cluster, aws, "default", Fidelity::Full, &mut terminal)?;

    if once {
        terminal.title("That was all of it");
        return Ok(());
    }
    terminal.title("It stays up for you");
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    let environment = aws.environment(tgb_e2e::USER);
    let needed =
        |name: &str| !name.contains("PAGER") && !name.contains("METADATA") && !name.ends_with("_FILE");
    let exports =
        environment.iter().filter(|(name, _)| needed(name)).map(|(name, value)| format!(" {name}={value}"));
    println!("export{}", exports.collect::<String>());
    println!("export PATH={}:$PATH", cluster.programs().directories());
    println!(
        "# metrics: http://{}/metrics http://{}/metrics",
        product.webhook().http(),
        product.controller().http()
    );
    println!("# Ctrl-C ends everything. Target groups and their targets:");
    let mut lines = 0;
    loop {
        // Who tries what happens when AWS refuses, or a target group goes, goes on.
        let table = table(cluster, aws).unwrap_or_else(|error| format!("{}\n", last_line(&error)));
        // back over the last table, line by line
        for _ in 0..lines {
            print!("\x1b[1A\x1b[2K");
        }
        lines = table.lines().count();
        print!("{table}");
        let _ = std::io::stdout().flush();
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// A line per target group with the states of its targets.
fn table(cluster: &Cluster, aws: &Aws) -> Result<String> {
    let groups = aws.cli(cluster, &["elbv2", "describe-target-groups", "--output", "json"]).json()?;
    let mut text = String::new();
    for group in groups.get("TargetGroups").and_then(|groups| groups.as_array()).into_iter().flatten() {
        let field = |name: &str| group.get(name).and_then(|value| value.as_str()).unwrap_or_default();
        let query = "TargetHealthDescriptions[].[Target.Id,Target.Port,TargetHealth.State]";
        let arn = field("TargetGroupArn");
        let args = [
            "elbv2",
            "describe-target-health",
            "--target-group-arn",
            arn,
            "--query",
            query,
            "--output",
            "text",
        ];
        let targets = match aws.cli(cluster, &args).ok() {
            Ok(targets) => {
                let lines = targets.lines();
                lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
            }
            Err(error) => vec![last_line(&error).to_owned()],
        };
        text.push_str(&format!("{:<18} {}\n", field("TargetGroupName"), targets.join(" | ")));
    }
    Ok(text)
}

fn last_line(text: &str) -> &str {
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default()
}

struct Terminal {
    started: Instant,
}

impl Screen for Terminal {
    fn title(&mut self, text: &str) {
        println!("\n== {text} ({:.0} s)", self.started.elapsed().as_secs_f64());
    }

    fn command(&mut self, output: &Output) {
        println!("$ {}", output.command);
        print!("{}{}", output.stdout, output.stderr);
    }
}
