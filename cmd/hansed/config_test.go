package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestLoadConfigSaysWhatIsWrong(t *testing.T) {
	good := "cluster: west\ntrustDomain: west.demo\ndataDir: data\n"
	for _, c := range []struct{ name, yaml, want string }{
		{"unknown field", good + "clutser: x\n", `unknown field "clutser"`},
		{"not YAML", "cluster: [", "yaml"},
		{"bad cluster", strings.Replace(good, "west\n", "West_1\n", 1), `cluster: "West_1" is not a DNS label`},
		{"bad trust domain", strings.Replace(good, "west.demo", "West Demo", 1), "trustDomain"},
		{"no data directory", "cluster: west\ntrustDomain: west.demo\n", "dataDir: missing"},
		{"gateway without port", good + "gateways: [127.0.0.1]\n", `gateways[0]: "127.0.0.1"`},
		{"admin for all", good + "admin: {listen: 0.0.0.0:7440}\n", "not a loopback address"},
		{"short root", good + "identity: {rootLife: 1h, x509Life: 1h}\n", "rootLife"},
		{"duration", good + "identity: {x509Life: 12}\n", "want a number with a unit"},
		{"SPIRE without its address", good + "identity: {spire: {workloadAPI: unix:///a}}\n", "identity.spire.server: missing"},
		{"SPIRE's address", good + "identity: {spire: {server: /run/s.sock, workloadAPI: unix:///a}}\n", `"/run/s.sock" is neither unix:///path nor host:port`},
		{"SPIRE without an agent", good + "identity: {spire: {server: unix:///s}}\n", "identity.spire.workloadAPI"},
		{"SPIRE's entries", good + "identity: {spire: {server: unix:///s, workloadAPI: unix:///a, entries: [{parent: 'spiffe://{{.TrustDomain}}/n'}]}}\n", "identity.spire.entries[0]: selectors: none"},
		{"SPIRE and attestors", good + "identity: {x509pop: {caFile: x}, spire: {server: unix:///s, workloadAPI: unix:///a}}\n", "agents attest at spire-server"},
		{"two upstreams", good + "identity: {upstream: {dir: a, spire: {server: 'h:1', workloadAPI: unix:///a}}}\n", "exclude each other"},
		{"upstream key", good + "identity: {upstream: {certFile: a}}\n", "certFile and keyFile go together"},
		{"upstream SPIRE", good + "identity: {upstream: {spire: {server: 'h:1'}}}\n", "identity.upstream.spire.workloadAPI"},
		{"curve", good + "identity: {keys: {curve: P-521}}\n", `identity.keys.curve: "P-521" is not one of P-256, P-384`},
		{"storage", good + "identity: {keys: {storage: tpm}}\n", `identity.keys.storage: "tpm"`},
		{"memory alone", good + "identity: {keys: {storage: memory}}\n", "memory needs identity.upstream"},
		{"no attestations", good + "identity: {attestation: {burst: -1}}\n", "identity.attestation.burst: -1"},
		{"less in all", good + "identity: {attestation: {perSecond: 500, allPerSecond: 200}}\n", "identity.attestation: all addresses together"},
		{"all together", "cluster: ''\ntrustDomain: ''\n", "3 faults"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "hansed.yaml")
			if err := os.WriteFile(path, []byte(c.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("err = %v\nwant one that names the file and has %q", err, c.want)
			}
		})
	}
	path := filepath.Join(t.TempDir(), "hansed.yaml")
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := LoadConfig(path)
	if err != nil || cfg.DataDir != filepath.Join(filepath.Dir(path), "data") || cfg.Network != "west" || cfg.XDS.Listen != ":7445" {
		t.Errorf("good file: %+v, %v", cfg, err)
	}
}

// TestPathsAreRelativeToTheFile sets every field that names a file to "x", and finds none of them left as it was.
func TestPathsAreRelativeToTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hansed.yaml")
	if err := os.WriteFile(path, []byte(`
cluster: west
trustDomain: west.demo
dataDir: x
configDir: x
socket: x
kubeAPI: {enabled: true, kubeconfig: x}
bundleEndpoint: {webRoots: x, web: {listen: ":8446", certFile: x, keyFile: x}}
etcd: {endpoints: ["https://h:1"], certFile: x, keyFile: x, caFile: x}
identity:
  x509pop: {caFile: x}
  kubernetes: {cluster: west, server: "https://h:1", caFile: x, tokenFile: x}
  upstream: {certFile: x, keyFile: x, caFile: x}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	paths := 0
	var walk func(name string, v reflect.Value)
	walk = func(name string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				walk(name+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.String:
			switch s := v.String(); {
			case s == "x":
				t.Errorf("%s is relative to the working directory", name)
			case s == filepath.Join(filepath.Dir(path), "x"):
				paths++
			}
		}
	}
	walk("", reflect.ValueOf(*c))
	if paths != 16 {
		t.Errorf("%d paths, want 16", paths)
	}
}
