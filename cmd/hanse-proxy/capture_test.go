package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/hanse-mesh/hanse/test/netns"
)

var update = flag.Bool("update", false, "rewrite docs/cli")

// The committed reference is what the commands say. `make docs` rewrites it.
func TestReferenceIsCurrent(t *testing.T) {
	const committed = "../../docs/cli"
	group, _, err := commands(&bytes.Buffer{}).Find([]string{"capture"})
	if err != nil {
		t.Fatal(err)
	}
	pages := 0
	for _, cmd := range append(group.Commands(), group) {
		cmd.DisableAutoGenTag = true
		cmd.InitDefaultHelpFlag()
		var b bytes.Buffer
		if err := doc.GenMarkdown(cmd, &b); err != nil {
			t.Fatal(err)
		}
		text := bytes.ReplaceAll(b.Bytes(), []byte("* [hanse-proxy](hanse-proxy.md)\t - \n"), nil) // has no page: its settings are in a file
		path := filepath.Join(committed, strings.ReplaceAll(cmd.CommandPath(), " ", "_")+".md")
		if *update {
			if err := os.WriteFile(path, text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%s is out of date: make docs (%v)", path, err)
		}
		pages++
		if !cmd.HasExample() || cmd.Long == "" {
			t.Errorf("%s has no example or no long help", cmd.CommandPath())
		}
	}
	if found, err := filepath.Glob(filepath.Join(committed, "hanse-proxy*.md")); err != nil || len(found) != pages {
		t.Errorf("%d pages for %d commands: %v", len(found), pages, found)
	}
}

const captured = sample + `
capture:
  enabled: true
  dns: true
  exemptUsers: [1503, "0"]
  outbound: {outside: deny, excludePorts: [25, "9000-9010"], exclude: [192.0.2.0/24, "2001:db8::1"]}
  inbound: {mode: permissive, exemptPorts: [9090]}
`

func TestCaptureConfig(t *testing.T) {
	c, err := LoadConfig(write(t, captured), "", "")
	if err != nil {
		t.Fatal(err)
	}
	r := c.rules(func(field, format string, args ...any) { t.Errorf(field+": "+format, args...) }, true)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"Table":"hanse"`, `"OutboundPort":15002`, `"InboundPort":15006`, `"DNSPort":15053`, `"Mark":1503`, `"UIDs":[1503,0]`, `"OwnPorts":[15008,15020]`,
		`"ExcludePorts":[{"First":25,"Last":25},{"First":9000,"Last":9010}]`, `"Exclude":["192.0.2.0/24","2001:db8::1/128"]`, `"Always":["240.0.0.0/4","fd68:616e:7365::/64"]`, `"ExcludePorts":[{"First":22,"Last":22}]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
	// A program that only calls is called by nobody.
	alone, _, _ := strings.Cut(sample, "workloads:")
	c, err = LoadConfig(write(t, alone+"capture: {enabled: true}\n"), "", "")
	if err != nil {
		t.Fatal(err)
	}
	if r := c.rules(nil, false); r.InboundPort != 0 || r.DNSPort != 0 {
		t.Errorf("%+v", r)
	}
	if c.dialer().Control == nil {
		t.Error("its own connections are not marked")
	}
}

func TestCaptureFaults(t *testing.T) {
	_, err := LoadConfig(write(t, sample+`
capture:
  enabled: true
  table: "Ä"
  outboundPort: 15001
  dns: true
  dnsPort: 15006
  sniff: 10s
  outbound: {outside: maybe, exclude: [10.0.0.1/8]}
  inbound: {mode: lax, exemptPorts: [0], include: [nowhere]}
`), "", "")
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"table \"Ä\"", "capture.outboundPort: 15001 is also the port of outbound.listen", "DNS port 15006 is also the inbound port", "capture.sniff: 10s", `capture.outbound.outside: "maybe"`,
		`capture.outbound.exclude[0]: "10.0.0.1/8" has bits`, `capture.inbound.mode: "lax"`, "capture.inbound.exemptPorts[0]", `capture.inbound.include[0]: "nowhere"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in\n%v", want, err)
		}
	}
	for _, wrong := range []string{"outbound: {excludePorts: [x]}", "outbound: {excludePorts: [70000]}", "exemptUsers: ['']"} {
		if _, err := LoadConfig(write(t, sample+"capture:\n  "+wrong+"\n"), "", ""); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
	if _, err := UserID("nobody-of-that-name").id(); err == nil {
		t.Error("an unknown user has an ID")
	}
}

func TestCaptureCommand(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED, NOT TESTED: rules of the kernel are Linux's")
	}
	netns.Test(t, func(t *testing.T) {
		ns := netns.New(t)
		path := write(t, captured)
		off := write(t, sample)
		changed := write(t, strings.Replace(captured, "dns: true", "dns: false", 1))
		foreach := func(args string) []string {
			args = strings.NewReplacer("FILE", path, "OFF", off, "CHANGED", changed, "NS", "--netns "+ns.Path()).Replace(args)
			return append([]string{"capture"}, strings.Fields(args)...)
		}
		for _, tc := range []struct {
			args string
			code int
			want string
		}{
			{"show --config FILE NS", 1, "table inet hanse is not installed: hanse-proxy capture install"},
			{"show --config FILE NS -o json", 1, `"installed": false`},
			{"install --config FILE NS --dry-run", 0, "# would be installed"},
			{"install --config FILE NS --dry-run", 0, "meta mark 0x000005df return"},
			{"show --config FILE NS", 1, "is not installed"},
			{"install --config FILE NS", 0, "installed table inet hanse: outbound to port 15002, inbound to port 15006, DNS to port 15053"},
			{"install --config FILE NS", 0, "is as configured already"},
			{"install --config FILE NS -o json", 0, `"changed": false`},
			{"install --config FILE NS --dry-run", 0, "# nothing would change"},
			{"show --config FILE NS", 0, "counter packets 0 redirect to :15002"},
			{"show --config FILE NS -o json", 0, `"matches": true`},
			{"show --config CHANGED NS", 1, "- app: meta l4proto udp udp dport 53"},
			{"install --config CHANGED NS --dry-run", 0, "# would replace what is installed"},
			{"install --config CHANGED NS", 0, "installed table"},
			{"remove --config FILE NS --dry-run", 0, "would remove table inet hanse"},
			{"remove --config FILE NS", 0, "removed table inet hanse"},
			{"remove --table hanse NS -o json", 0, `"changed": false`},
			{"install --config OFF NS", 1, "hint: set enabled: true in the section capture"},
			{"install --config /nowhere NS", 1, "no such file"},
			{"remove --config /nowhere NS", 1, "or say --table"},
			{"install --config FILE --netns /nowhere", 1, "network namespace: open /nowhere"},
			{"install --nonsense", 2, "hint: hanse-proxy capture --help"},
			{"install surplus", 2, "takes no argument"},
			{"show -o yaml", 2, "want text or json"},
			{"nonsense", 2, "unknown command"},
			{"--help", 0, "nsenter"},
		} {
			var out bytes.Buffer
			if code := run(foreach(tc.args), &out, &out); code != tc.code || !strings.Contains(out.String(), tc.want) {
				t.Errorf("%s: exit %d, want %d and %q in\n%s", tc.args, code, tc.code, tc.want, out.String())
			}
		}
	})
}

// TestHelpIsStrict: a command that groups others takes none that it does not have.
func TestHelpIsStrict(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Args == nil && cmd.HasParent() {
			t.Errorf("%s takes any arguments", cmd.CommandPath())
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(commands(&bytes.Buffer{}))
}
