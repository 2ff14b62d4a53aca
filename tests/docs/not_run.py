"""What of README.md and docs/ is not run by test_commands.py, each with the reason.

A command that is neither run nor here fails the test, and so does a line here that no page shows.
"""

NOT_RUN: dict[str, list[str]] = {
    "fetches data or programs from the network": [
        "molora train data --out data",
        "molora train data math",
        "molora train data",
        "molora train data math code --out data",
        "molora train data many",
        "molora train data math code medicine law ukrainian science reading commonsense puzzles both",
        "molora train data passages math code medicine law commonsense puzzles science",
        "molora train people presidents",
        "molora train people raters",
        "pip install .",
        "pip install molora[serve]",
        "pip install molora[ray]",
        "pip install molora[eval]",
        "make demo",
        "make test",
        "make vllm",
        "tools/federated_env.sh",
        ". .venv-federated/bin/activate",
        "npm install --prefix ~/lighthouse lighthouse@12.8.2",
    ],
    "the base writes every text itself, which takes hours; tests/unit/test_cli.py holds the command": [
        "molora train personas --out data",
        "molora train manners --out manners",
    ],
    "trains for minutes to hours; tests/training does each in the small": [
        "molora train starter processes=4",
        "molora train starter --config training/molora_training/configs/quality.yaml processes=5 router_processes=6",
        "molora train starter --config training/molora_training/configs/quality-routers.yaml router_processes=6",
        "molora train starter --config training/molora_training/configs/many.yaml processes=5 router_processes=3",
        "molora train hypernet doc out=document-net loop.steps=10000",
        "molora train hypernet doc --config training/molora_training/configs/document-passages.yaml start=document-net "
        "out=net-2",
        "molora train hypernet profile raters out=profile-net loop.steps=400",
        "molora train hypernet text --config training/molora_training/configs/manners-net.yaml out=text-net",
        "molora train pieces people=presidents out=pieces sharers=20",
        "molora train pieces people=raters task=task out=pieces",
        "molora train adapter --config training/molora_training/configs/task.yaml out=task "
        "data.train=data/task-raters.train.jsonl data.validation=data/task-raters.validation.jsonl",
    ],
    "measures for minutes to hours; tests/training and tests/docs hold its report in the small": [
        "molora eval main --routers runs/starter/routers --out docs/results/main.json",
        "molora eval quality my-molora --limit 20 --out quality.json",
        "molora eval quality runs/quality/stack --routers runs/quality/routers --out quality.json",
        "molora eval scale runs/many/routers --out scale.json",
        "molora eval headline runs/quality/stack Qwen2.5-Coder-0.5B-Instruct --out headline.json",
        "molora eval harness my-molora -b sciq -b medmcqa --select domain=auto",
        "molora eval merges model=my-molora data=data",
        "molora eval documents net-2",
        "molora eval people people=raters task=task pool=pieces net=profile-net new_tokens=6",
        "molora eval continual math code medicine law science reading commonsense puzzles --out continual.json",
        "molora eval stream speech-barack-obama speech-james-polk --general science --out stream.json",
        "molora bench costs my-molora --out costs.json",
        "molora bench serve --users 1000 --rate 4",
        "molora bench serve --users 1000 --zipf 1.0 --rate 4 --live 64",
        "benchmarks/quality.sh",
        "python -m benchmarks.chats --chats 8",
        "python -m benchmarks.forward_memory --batch-tokens 2048",
        "python -m benchmarks.federated_row puzzles-caesar-cipher puzzles-family-relationships puzzles-knights-knaves "
        "puzzles-letter-counting puzzles-letter-jumble puzzles-number-sequence puzzles-spell-backward "
        "puzzles-syllogism puzzles-word-sequence-reversal puzzles-word-sorting",
        "python -m benchmarks.soak --requests 50000",
    ],
    "needs a GPU, or minutes of Triton's interpreter": [
        "python -m benchmarks.peers --out peers.json",
        "python -m benchmarks.kernels --out kernels.csv",
        "python -m benchmarks.kernels --contenders vllm --out vllm.csv",
        "MOLORA_TEST_DEVICE=cuda python -m pytest tests/kernels tests/parity",
        "python -m benchmarks.tune --out tiles.json",
        "python -m benchmarks.forms --out tiles.json",
        "python -m benchmarks.step --peer",
        "TRITON_INTERPRET=1 python -m benchmarks.peers --device cpu --shape tiny --context 12",
    ],
    "asks a server that runs; tests/serve asks one, and test_routes_that_curl_asks_for_exist holds the addresses": [
        "molora bench serve --url http://127.0.0.1:8000 --name base+user/u{user}",
        "molora bench serve --url http://127.0.0.1:8000 --name u{user} --users 20 --rate 8",
        "molora bench serve --url http://127.0.0.1:8001 --name base+user/u{user} --users 20 --rate 8",
        "molora bench serve --url http://127.0.0.1:8000 --name base+user/u{user} --users 20 --rate 8",
        "curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
        """'{"model": "base+auto", "temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": """
        """"A pen costs 3 coins. What do 7 pens cost?"}]}'""",
        "curl -H 'Authorization: Bearer $KEY' localhost:8000/v1/adapters/user",
        "curl -H 'Authorization: Bearer $KEY' -F f=@adapter_config.json -F f=@adapter_model.safetensors "
        "localhost:8000/v1/adapters/user/ada",
        "curl -H 'Authorization: Bearer $KEY' -X DELETE localhost:8000/v1/adapters/user/ada",
        "curl -H 'Authorization: Bearer $KEY' -X PUT localhost:8000/v1/adapters/user/ada/pin",
        "curl -H 'Authorization: Bearer $KEY' localhost:8000/v1/adapters/user?pinned=true",
        "curl -H 'Authorization: Bearer $KEY' -X DELETE localhost:8000/v1/adapters/user/ada/pin",
    ],
    "opens a page in a browser; tests/browser drives it": [
        "molora demo --port 8080",
        "molora demo my-molora --port 8080 --no-browser",
        "molora demo --server http://127.0.0.1:8000",
        "python -m tools.lighthouse starter ~/lighthouse",
    ],
    "trains for minutes on the base; tests/examples runs each on a tiny one": [
        "python examples/bring_your_own_adapters.py",
        "python examples/support_desk.py",
        "python examples/companion.py",
    ],
    "starts a Ray cluster; tests/serve/test_replicas.py does": [
        "molora serve my-molora --ray --replicas 2 --store s3://bucket/adapters",
    ],
    "needs vLLM, in an environment of its own; `make vllm` runs tests/vllm": [
        "python -m benchmarks.vllm_pace --out vllm_pace.json",
        "python -m benchmarks.vllm_pace --tensor-parallel 2 --out vllm_pace_two.json",
        "python -m benchmarks.vllm_pace --shape tiny --modes eager --batch 1 4 --out vllm_pace.json",
        "molora serve my-molora --engine vllm --tensor-parallel 2",
        "VLLM_USE_V2_MODEL_RUNNER=0 vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules "
        "mine=exported/my-molora-3f2a90c1d4e5",
    ],
    "needs Flower, in an environment of its own; `make federated` runs tests/federated": [
        "molora federate run --simulate 20 --config training/molora_training/configs/federate.yaml",
        "molora federate run data=chats rounds=5 --into my-molora domain math --general general.jsonl",
        "molora federate app speeches --config training/molora_training/configs/federate.yaml",
        "molora federate run data=chats ranks=[4,16] rounds=5 local.examples=32",
        "molora federate run data=chats ranks=[8,16] --into my-molora domain math --general general.jsonl",
        "molora federate run data=chats ranks=[8,16] --into my-molora domain speeches",
        "flower-superlink --ssl-certfile server.crt --ssl-keyfile server.key --ssl-ca-certfile ca.crt --host 0.0.0.0 "
        "--port 8443 --disable-runtime-dependency-installation",
        "flower-supernode --superlink server.example.org:8443 --root-certificates ca.crt --node-config "
        "'data=\"chats.jsonl\" rank=8' --ssl-certfile node.crt --ssl-keyfile node.key --ssl-ca-certfile node-ca.crt",
        "molora federate app speeches --config training/molora_training/configs/federate.yaml out=/srv/molora/speeches",
        "flwr run speeches hosts --stream",
        "molora federate run data=chats aggregate=shared privacy.secure=true privacy.clip=1.0",
        "molora federate run data=chats aggregate=shared privacy.secure=true privacy.epsilon=8 privacy.cohorts=4 "
        "rounds=16",
    ],
    "starts several processes; tests/training/test_processes.py and tests/parity/test_spread.py do": [
        "accelerate launch --num_processes 4 -m molora train router --config router.yaml",
        "accelerate launch --num_processes 4 -m molora train hypernet doc --config document.yaml",
        "torchrun --nproc-per-node 2 -m molora train router --config router.yaml",
        "torchrun --nproc-per-node 2 ask.py",
        "PYTHONPATH=.:kernels:training:demo python -m benchmarks.several --out several.json",
    ],
    "runs tests, which run anyway": ["python -m pytest tests/kernels/test_sort.py"],
    "prints what tests/docs/test_token_costs.py holds": ["python -m tools.token_costs"],
    "writes docs/; tests/docs/test_results.py runs it and compares": ["python -m tools.render_results"],
}
LISTED = {text for texts in NOT_RUN.values() for text in texts}

# Blocks of Python, by how they begin.
PYTHON_NOT_RUN: dict[str, str] = {
    "from openai import OpenAI": "asks a server that runs; tests/serve does",
    "import molora_training.harness": "asks for minutes; tests/training/test_harness.py does",
    'model = MoLoRAModel.from_base("path/to/base"': "needs a GPU",
    "from transformers import AutoModelForCausalLM, AutoTokenizer\nfrom transformers.distributed": "needs several "
    "processes; tests/parity/test_spread.py starts them",
    "client.completions.create": "asks vLLM's server; tests/vllm does",
    "from vllm import": "needs vLLM; tests/vllm does",
}
