//! Commands in running instances.

use funtainer_contract::Exit;
use funtainer_contract::exec::ExecRequest;
use funtainer_engine::backend::SignalTarget;
use funtainer_engine::{CommandHandle, CommandStreams, ExecOrder};
use funtainer_model::{ErrorCode, Failure, InstanceId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::wait_until;
use crate::{Bench, http, id, in_still_time, seconds, stdio, with};

fn cat() -> ExecOrder {
    let request =
        ExecRequest { command: vec!["cat".to_owned()], env: Vec::new(), working_dir: None, user: None, terminal: None };
    ExecOrder { instance: None, start: false, request }
}

async fn exec(bench: &Bench, name: &str, order: ExecOrder) -> Result<CommandHandle, Failure> {
    bench.engine.exec(&id(name), order).await
}

async fn refused(bench: &Bench, name: &str, order: ExecOrder) -> ErrorCode {
    exec(bench, name, order).await.err().expect("a refusal").code
}

fn instances(bench: &Bench, name: &str) -> Vec<InstanceId> {
    bench.engine.describe(&id(name)).unwrap().instances.iter().map(|instance| instance.id).collect()
}

#[tokio::test(start_paused = true)]
async fn a_command_speaks_and_ends() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    let mut command = exec(&bench, "f", cat()).await.unwrap();
    command.signals.send("USR1".parse().unwrap()).await;
    let CommandStreams::Pipes { stdin, stdout, .. } = &mut command.streams else { panic!("pipes") };
    stdin.take().unwrap().write_all(b"ping").await.unwrap();
    let mut answer = String::new();
    stdout.take().unwrap().read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ping");
    let report = command.exit.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!(report.exit, Exit::Code(0));
    let sent = bench.fake.signals.lock().unwrap().clone();
    assert!(matches!(sent[..], [(SignalTarget::Exec(_), 10)]), "{sent:?}");
    drop(command);
    assert_eq!(bench.fake.execs.lock().unwrap().len(), 1, "what has ended is not killed");
}

#[tokio::test(start_paused = true)]
async fn it_ends_with_its_handle() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    let command = exec(&bench, "f", cat()).await.unwrap();
    assert_eq!(bench.fake.execs.lock().unwrap().len(), 1);
    drop(command);
    wait_until("its end", || bench.fake.execs.lock().unwrap().is_empty()).await;
    assert_eq!(bench.fake.alive(), 1);
}

#[tokio::test(start_paused = true)]
async fn it_needs_an_instance() {
    let bench = Bench::new().await;
    assert_eq!(refused(&bench, "f", cat()).await, ErrorCode::FunctionUnknown);
    bench.deploy(http("f")).await.unwrap();
    let first = instances(&bench, "f")[0];
    bench.engine.scale(&id("f"), 2).await.unwrap();
    let second = instances(&bench, "f")[1];
    let of = |command: &CommandHandle| {
        let SignalTarget::Exec(exec) = target(command) else { panic!("a command") };
        bench.fake.execs.lock().unwrap()[&exec].0
    };
    assert_eq!(of(&exec(&bench, "f", cat()).await.unwrap()), first);
    assert_eq!(of(&exec(&bench, "f", ExecOrder { instance: Some(second), ..cat() }).await.unwrap()), second);
    let unknown = ExecOrder { instance: Some(InstanceId::from_bytes([9; 16])), ..cat() };
    assert_eq!(refused(&bench, "f", unknown).await, ErrorCode::InstanceUnknown);

    bench.engine.scale(&id("f"), 0).await.unwrap();
    assert_eq!(refused(&bench, "f", cat()).await, ErrorCode::NotRunning);
    assert_eq!(refused(&bench, "f", ExecOrder { instance: Some(first), ..cat() }).await, ErrorCode::InstanceUnknown);
    assert_eq!(bench.fake.alive(), 0);
    let started = exec(&bench, "f", ExecOrder { start: true, ..cat() }).await.unwrap();
    assert_eq!((bench.fake.alive(), of(&started)), (1, instances(&bench, "f")[0]));

    bench.deploy(stdio("s")).await.unwrap();
    assert_eq!(refused(&bench, "s", ExecOrder { start: true, ..cat() }).await, ErrorCode::NotRunning);
    bench.engine.drain(seconds(1)).await;
    assert_eq!(refused(&bench, "f", cat()).await, ErrorCode::ShuttingDown);
}

fn target(command: &CommandHandle) -> SignalTarget {
    command.signals.target()
}

#[tokio::test(start_paused = true)]
async fn an_instance_does_not_end_for_its_idleness_while_one_runs() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.idle_timeout = seconds(10))).await.unwrap();
    let command = exec(&bench, "f", cat()).await.unwrap();
    tokio::time::sleep(seconds(1000)).await;
    assert_eq!(bench.fake.alive(), 1);
    drop(command);
    tokio::time::sleep(seconds(8)).await;
    assert_eq!(bench.fake.alive(), 1, "its time begins with the end of the command");
    tokio::time::sleep(seconds(30)).await;
    assert_eq!(bench.fake.alive(), 0);
}

#[tokio::test(start_paused = true)]
async fn there_is_a_most_of_them() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    in_still_time(async {
        let mut all = Vec::new();
        for _ in 0..256 {
            all.push(exec(&bench, "f", cat()).await.unwrap());
        }
        assert_eq!(refused(&bench, "f", cat()).await, ErrorCode::QueueFull);
        all.pop();
        assert!(exec(&bench, "f", cat()).await.is_ok());
    })
    .await;
}
