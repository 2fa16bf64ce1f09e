package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const tools = "../../bin/"

// lab is one hansed with its socket.
type lab struct {
	t                 *testing.T
	dir, socket, port string
}

func freePorts(t *testing.T, n int) []string {
	t.Helper()
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // together, so that no port is given twice
		out = append(out, fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
	}
	return out
}

// start starts a program, which ends with the test, or by stop.
func start(t *testing.T, log, program string, args ...string) (stop func()) {
	t.Helper()
	return run(t, log, program, args...).stop
}

// proc is a program that runs.
type proc struct {
	*exec.Cmd
	stop func()        // by SIGTERM, and waits
	done chan struct{} // closed when it has ended
}

// run starts a program, which ends with the test at the latest. Its log is shown if the test fails.
func run(t *testing.T, log, program string, args ...string) *proc {
	t.Helper()
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p := &proc{Cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.Stdout, p.Stderr = f, f
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.Wait(); f.Close(); close(p.done) }()
	p.stop = sync.OnceFunc(func() {
		_ = p.Process.Signal(syscall.SIGCONT) // paused, it could not end
		_ = p.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(15*time.Second, func() { _ = p.Process.Kill() })
		<-p.done
		kill.Stop()
	})
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			b, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", log, b[max(0, len(b)-6000):])
		}
	})
	return p
}

// kill ends it at once.
func (p *proc) kill() {
	_ = p.Process.Kill()
	<-p.done
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "hs") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := freePorts(t, 5)
	l := &lab{t: t, dir: dir, socket: filepath.Join(dir, "d/spire-server/api.sock"), port: p[0]}
	if err := os.Mkdir(filepath.Join(dir, "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	l.save("hansed.yaml", fmt.Sprintf(`cluster: west
trustDomain: west.demo
dataDir: d
socket: h.sock
configDir: c
identity:
  {listen: "127.0.0.1:%s", x509Life: 20s, rootLife: 2h, linger: 1s, entries: [{parent: "spiffe://{{.TrustDomain}}/node", selectors: ["unix:uid:%d"]}]}
federation: {listen: "127.0.0.1:%s"}
xds: {listen: "127.0.0.1:%s"}
bundleEndpoint: {listen: "127.0.0.1:%s"}
admin: {listen: "127.0.0.1:%s"}
`, p[0], os.Getuid(), p[1], p[2], p[3], p[4]))
	start(t, filepath.Join(dir, "hansed.log"), tools+"hansed", "--config", filepath.Join(dir, "hansed.yaml"))
	l.eventually("hansed is healthy", func() error { _, err := l.try("healthcheck"); return err })
	return l
}

func (l *lab) save(name, text string) string {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	return path
}

func (l *lab) eventually(what string, f func() error) {
	l.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// try runs the spire-server CLI: the words of the command first, then its flags.
func (l *lab) try(args ...string) (string, error) {
	n := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "-") })
	if n < 0 {
		n = len(args)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, tools+"tools/spire-server", slices.Concat(args[:n], []string{"-socketPath", l.socket}, args[n:])...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("spire-server %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// run wants success and, in the answer, each part.
func (l *lab) run(command string, want ...string) string {
	l.t.Helper()
	out, err := l.try(strings.Fields(command)...)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			l.t.Errorf("spire-server %s:\n%s\nwant %q in it", command, out, w)
		}
	}
	return out
}

// refuse wants a refusal that says why.
func (l *lab) refuse(command, why string) {
	l.t.Helper()
	if out, err := l.try(strings.Fields(command)...); err == nil || !strings.Contains(err.Error(), why) {
		l.t.Errorf("spire-server %s: %v %s, want a refusal with %q", command, err, out, why)
	}
}

func (l *lab) find(out, pattern string) string {
	l.t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(out)
	if m == nil {
		l.t.Fatalf("no %s in:\n%s", pattern, out)
	}
	return m[1]
}

// agent starts an unmodified spire-agent and returns its Workload API address.
func (l *lab) agent(token string) string {
	l.t.Helper()
	bundle := l.save("bootstrap.pem", l.run("bundle show"))
	api := filepath.Join(l.dir, "w.sock")
	conf := l.save("agent.conf", fmt.Sprintf(`agent {
  data_dir = %q
  log_level = "DEBUG"
  server_address = "127.0.0.1"
  server_port = %s
  socket_path = %q
  trust_bundle_path = %q
  trust_domain = "west.demo"
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, filepath.Join(l.dir, "agent"), l.port, api, bundle))
	start(l.t, filepath.Join(l.dir, "agent.log"), tools+"tools/spire-agent", "run", "-config", conf, "-joinToken", token)
	return "unix://" + api
}

// countKeys counts the authorities of a bundle in SPIFFE's JSON.
func countKeys(bundle string) (x509Keys, jwtKeys int, err error) {
	var b struct{ Keys []struct{ Use string } }
	if err := json.Unmarshal([]byte(bundle), &b); err != nil {
		return 0, 0, err
	}
	for _, k := range b.Keys {
		if k.Use == "x509-svid" {
			x509Keys++
		} else {
			jwtKeys++
		}
	}
	return x509Keys, jwtKeys, nil
}

func authorityOf(s *x509svid.SVID) string { return fmt.Sprintf("%x", s.Certificates[0].AuthorityKeyId) }

// TestAgent: join token, SVIDs with a federated bundle, renewal, rotation by an administrator, ban.
func TestAgent(t *testing.T) {
	l := newLab(t)
	east := l.save("east.json", l.eastBundle())
	l.run("bundle set -id spiffe://east.demo -format spiffe -path " + east)
	token := l.find(l.run("token generate -spiffeID spiffe://west.demo/node"), `Token: (\S+)`)
	addr := l.agent(token)
	l.eventually("the agent is listed", func() error {
		out, err := l.try("agent", "list")
		if err == nil && !strings.Contains(out, "Found 1 attested agent") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	agentID := l.find(l.run("agent list"), `SPIFFE ID\s*: (\S+)`)
	l.run("agent show -spiffeID "+agentID, "join_token")
	l.run(fmt.Sprintf("entry create -parentID %s -spiffeID spiffe://west.demo/ns/shop/sa/frontend -selector unix:uid:%d -federatesWith spiffe://east.demo -x509SVIDTTL 20", agentID, os.Getuid()), "FederatesWith")

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var src *workloadapi.X509Source
	l.eventually("the workload has its SVID", func() error {
		var err error
		short, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		src, err = workloadapi.NewX509Source(short, workloadapi.WithClientOptions(workloadapi.WithAddr(addr)),
			workloadapi.WithDefaultX509SVIDPicker(func(all []*x509svid.SVID) *x509svid.SVID {
				for _, s := range all {
					if s.ID.Path() == "/ns/shop/sa/frontend" {
						return s
					}
				}
				return all[0]
			}))
		return err
	})
	defer src.Close()
	svid := func() *x509svid.SVID {
		s, err := src.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := svid()
	if first.ID.String() != "spiffe://west.demo/ns/shop/sa/frontend" {
		t.Errorf("the SVID is of %s", first.ID)
	}
	if _, err := src.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("east.demo")); err != nil {
		t.Errorf("federated bundle: %v", err)
	}
	l.eventually("renewal", func() error {
		if svid().Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
			return fmt.Errorf("still the first SVID, which ends %s", first.Certificates[0].NotAfter)
		}
		return nil
	})

	serial := func() string { return l.find(l.run("agent show -spiffeID "+agentID), `Serial number\s*: (\S+)`) }
	before, agentBefore := authorityOf(svid()), serial()
	next := l.find(l.run("localauthority x509 prepare"), `Authority ID: (\S+)`)
	l.run("localauthority x509 show", next, before)
	l.run("localauthority x509 activate -authorityID "+next, next)
	l.run("localauthority x509 taint -authorityID "+before, before)
	l.eventually("the SVID comes from the next authority", func() error {
		s := svid()
		if got := authorityOf(s); got != next {
			return fmt.Errorf("it comes from %s, want %s", got, next)
		}
		b, err := src.GetX509BundleForTrustDomain(s.ID.TrustDomain())
		if err == nil {
			_, _, err = x509svid.Verify(s.Certificates, b)
		}
		return err
	})
	// Revoked earlier, the root would shut the agent out, which cannot attest again by its token.
	l.eventually("the agent has renewed its own SVID", func() error {
		if s := serial(); s == agentBefore {
			return fmt.Errorf("it is still %s", s)
		}
		return nil
	})
	l.run("localauthority x509 revoke -authorityID "+before, before)
	l.eventually("the workload's bundle has lost the revoked root", func() error {
		b, err := src.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("west.demo"))
		if err == nil && len(b.X509Authorities()) != 1 {
			err = fmt.Errorf("%d roots", len(b.X509Authorities()))
		}
		return err
	})
	l.run("agent ban -spiffeID "+agentID, "banned")
	l.run("agent evict -spiffeID "+agentID, "evicted")
	l.run("agent list", "No attested agents found")
}

// eastBundle is a foreign trust domain's.
func (l *lab) eastBundle() string {
	l.t.Helper()
	td := spiffeid.RequireTrustDomainFromString("east.demo")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		l.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		l.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		l.t.Fatal(err)
	}
	b, err := spiffebundle.FromX509Authorities(td, []*x509.Certificate{cert}).Marshal()
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

// TestCommands goes through the spire-server CLI.
func TestCommands(t *testing.T) {
	l := newLab(t)
	if info, err := os.Stat(l.socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	l.run("healthcheck", "Server is healthy.")

	id := l.find(l.run("entry create -parentID spiffe://west.demo/node -spiffeID spiffe://west.demo/a -selector unix:uid:1"), `Entry ID\s*: (\S+)`)
	l.run("entry show -entryID "+id, "spiffe://west.demo/a")
	l.run("entry update -entryID "+id+" -parentID spiffe://west.demo/node -spiffeID spiffe://west.demo/b -selector unix:uid:2", "spiffe://west.demo/b")
	l.run("entry count", "1 registration entr")
	l.refuse("entry create -parentID spiffe://west.demo/node -spiffeID spiffe://other.demo/a -selector unix:uid:1", "other.demo")
	l.run("entry delete -entryID "+id, "Deleted entry")
	l.refuse("entry show -entryID "+id, "not found")
	l.refuse("agent show -spiffeID spiffe://west.demo/spire/agent/none", "not found")
	l.run("agent count", "0 attested agents")
	l.run("agent purge", "No agents to purge")
	l.refuse("upstreamauthority taint -subjectKeyID "+strings.Repeat("ab", 20), "NotFound")
	l.refuse("upstreamauthority revoke -subjectKeyID "+strings.Repeat("ab", 20), "NotFound")

	l.refuse("bundle set -id spiffe://east.demo -format spiffe -path "+l.save("w.json", l.run("bundle show -format spiffe")), "bundle of east.demo")
	l.run("bundle set -id spiffe://east.demo -format spiffe -path "+l.save("e.json", l.eastBundle()), "bundle set")
	l.run("bundle list", "east.demo")
	l.run("bundle count", "2")
	l.run("bundle delete -id spiffe://east.demo", "bundle deleted")

	l.run("federation create -trustDomain north.demo -bundleEndpointURL https://127.0.0.1:1/b -bundleEndpointProfile https_web", "north.demo")
	l.run("federation list", "Found 1 federation relationship")
	l.run("federation show -trustDomain north.demo", "https_web")
	l.run("federation update -trustDomain north.demo -bundleEndpointURL https://127.0.0.1:2/b -bundleEndpointProfile https_web", "127.0.0.1:2")
	l.refuse("federation refresh -id north.demo", "127.0.0.1:2")
	l.run("federation delete -id north.demo", "deleted")

	active := l.find(l.run("localauthority jwt show"), `Authority ID: (\S+)`)
	next := l.find(l.run("localauthority jwt prepare"), `Authority ID: (\S+)`)
	l.refuse("localauthority jwt activate -authorityID "+active+"x", "unexpected authority ID")
	l.refuse("localauthority jwt taint -authorityID "+active, "unable to taint current local authority")
	l.refuse("localauthority jwt taint -authorityID "+next, "only Old local authorities can be tainted")
	l.refuse("localauthority jwt revoke -authorityID "+active, "unable to use current authority")
	l.run("localauthority jwt activate -authorityID "+next, next)
	l.run("localauthority jwt taint -authorityID "+active, active)
	l.run("localauthority jwt revoke -authorityID "+active, active)
	l.refuse("localauthority jwt revoke -authorityID "+active, "no JWT authority found with provided authority ID")

	out := l.run("x509 mint -spiffeID spiffe://west.demo/minted -ttl 10s")
	block, _ := pem.Decode([]byte(out[max(0, strings.Index(out, "-----BEGIN")):]))
	if block == nil {
		t.Fatalf("x509 mint: %s", out)
	}
	if c, err := x509.ParseCertificate(block.Bytes); err != nil || c.URIs[0].String() != "spiffe://west.demo/minted" {
		t.Errorf("minted: %v", err)
	}
	if jwt := strings.TrimSpace(l.run("jwt mint -spiffeID spiffe://west.demo/minted -audience me")); strings.Count(jwt, ".") != 2 {
		t.Errorf("jwt mint: %s", jwt)
	}

	l.run("logger get", "info")
	l.run("logger set -level debug", "debug")
	l.run("logger reset", "info")
	var shown struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal([]byte(l.run("bundle show -format spiffe")), &shown); err != nil || len(shown.Keys) != 2 {
		t.Errorf("bundle show: %v, %d keys; want the X.509 and the JWT key of one root", err, len(shown.Keys))
	}
}
