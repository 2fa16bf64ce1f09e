package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	_ "go.etcd.io/etcd/server/v3/etcdmain" // of the program that buildEtcd builds: what that needs stays in go.mod
	"go.uber.org/zap"
)

// buildEtcd builds etcd, of the version that hansed embeds, beside the other programs: once, and only for tests that run it.
var buildEtcd = sync.OnceValue(func() error {
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(bin, "etcd"), "go.etcd.io/etcd/server/v3")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build etcd: %w: %s", err, out)
	}
	return nil
})

// etcdCluster is an external etcd as people run one: processes of their own, TLS with client certificates on both of its ports.
type etcdCluster struct {
	l       *lab
	c       *cluster
	pki     string // folder
	token   string // of the first start, or of a restore
	members []*etcdMember
}

type etcdMember struct {
	name, host, dir string
}

func (m *etcdMember) client() string { return "https://" + m.host + ":2379" }
func (m *etcdMember) peer() string   { return "https://" + m.host + ":2380" }

// etcdOfThree plans an etcd of three members for a cluster, and has the given hansed of it reach etcd by TLS.
func (l *lab) etcdOfThree(c *cluster, hansed ...*cluster) *etcdCluster {
	l.t.Helper()
	if err := buildEtcd(); err != nil {
		l.t.Fatal(err)
	}
	e := &etcdCluster{l: l, c: c, pki: filepath.Join(l.dir, "pki"), token: "first"}
	for range 3 {
		e.plan()
	}
	l.pki(e.pki)
	for _, h := range hansed {
		path := filepath.Join(h.Dir, "hansed.yaml")
		b, err := os.ReadFile(path)
		if err != nil {
			l.t.Fatal(err)
		}
		file := func(name string) string { return filepath.Join(e.pki, name) }
		l.save(path, string(b)+fmt.Sprintf("\netcd: {endpoints: [%s], certFile: %s, keyFile: %s, caFile: %s}\n",
			e.endpoints(), file("client.crt"), file("client.key"), file("ca.crt")))
	}
	return e
}

// overThree starts a lab's cluster west as two hansed over an etcd of three members, and waits until both sign.
func (l *lab) overThree(timers string) (west, two *cluster, etcd *etcdCluster) {
	l.t.Helper()
	west = l.cluster("west")
	two = l.second(west, timers)
	etcd = l.etcdOfThree(west, west, two)
	for _, x := range etcd.members {
		etcd.start(x, "new", etcd.members...)
	}
	etcd.healthy(etcd.members...)
	l.args["west/hansed"] = []string{"--replica", "one"}
	l.up()
	l.start("west-2/hansed", "hansed", "--config", filepath.Join(two.Dir, "hansed.yaml"), "--replica", "two")
	l.ready("west-2/hansed", two.Admin)
	l.signing("west-2", 2)
	return west, two, etcd
}

// plan adds a member that has never run, with a name, an address and a folder that no other had.
func (e *etcdCluster) plan() *etcdMember {
	n := len(e.members) + 1
	m := &etcdMember{name: fmt.Sprintf("m%d", n), host: strings.TrimSuffix(e.c.GatewayIP, "9") + fmt.Sprint(100+n)}
	m.dir = filepath.Join(e.l.dir, "etcd-"+m.name)
	e.members = append(e.members, m)
	return m
}

// endpoints are the clients' URLs of members; of all that were planned, if none is given.
func (e *etcdCluster) endpoints(of ...*etcdMember) string {
	if len(of) == 0 {
		of = e.members
	}
	urls := make([]string, 0, len(of))
	for _, m := range of {
		urls = append(urls, m.client())
	}
	return strings.Join(urls, ",")
}

func (e *etcdCluster) process(m *etcdMember) string { return "etcd-" + m.name }

// initial is etcd's --initial-cluster.
func initial(of ...*etcdMember) string {
	list := make([]string, 0, len(of))
	for _, m := range of {
		list = append(list, m.name+"="+m.peer())
	}
	return strings.Join(list, ",")
}

// start starts a member of a cluster of these; state is "new" or "existing".
func (e *etcdCluster) start(m *etcdMember, state string, of ...*etcdMember) {
	e.l.t.Helper()
	file := func(name string) string { return filepath.Join(e.pki, name) }
	e.l.start(e.process(m), "etcd", "--name", m.name, "--data-dir", m.dir, "--log-level", "error", "--unsafe-no-fsync", // kill -9 of a process loses nothing for that
		"--listen-client-urls", m.client(), "--advertise-client-urls", m.client(), "--listen-peer-urls", m.peer(), "--initial-advertise-peer-urls", m.peer(),
		"--initial-cluster", initial(of...), "--initial-cluster-state", state, "--initial-cluster-token", e.token,
		"--cert-file", file("server.crt"), "--key-file", file("server.key"), "--trusted-ca-file", file("ca.crt"), "--client-cert-auth",
		"--peer-cert-file", file("server.crt"), "--peer-key-file", file("server.key"), "--peer-trusted-ca-file", file("ca.crt"), "--peer-client-cert-auth")
}

// lose is a member whose machine is gone, and its disk with it.
func (e *etcdCluster) lose(m *etcdMember) {
	e.l.t.Helper()
	e.l.kill(e.process(m))
	if err := os.RemoveAll(m.dir); err != nil {
		e.l.t.Fatal(err)
	}
}

// stock is the stock client, as etcdctl is one, of some members.
func (e *etcdCluster) stock(of ...*etcdMember) *clientv3.Client {
	e.l.t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(e.pki, "client.crt"), filepath.Join(e.pki, "client.key"))
	if err != nil {
		e.l.t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(e.pki, "ca.crt"))
	if err != nil {
		e.l.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	c, err := clientv3.New(clientv3.Config{Endpoints: strings.Split(e.endpoints(of...), ","), DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
		TLS: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, RootCAs: roots}})
	if err != nil {
		e.l.t.Fatal(err)
	}
	e.l.t.Cleanup(func() { c.Close() })
	return c
}

// healthy waits until these members answer, each by itself, with what all agree on.
func (e *etcdCluster) healthy(of ...*etcdMember) {
	e.l.t.Helper()
	for _, m := range of {
		c := e.stock(m)
		e.l.eventually(time.Minute, "etcd member "+m.name+" answers", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_, err := c.Get(ctx, "hanse")
			return err
		})
	}
}

// replace puts a new member, at a new address, in the place of one that is lost, by way of one that is there.
func (e *etcdCluster) replace(lost, by *etcdMember, stay ...*etcdMember) *etcdMember {
	e.l.t.Helper()
	c := e.stock(by)
	ask := func(what string, f func(context.Context) error) {
		e.l.t.Helper()
		e.l.eventually(time.Minute, what, func() error { // etcd refuses while a member that is new is not in touch yet
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			return f(ctx)
		})
	}
	ask("etcdctl member remove "+lost.name, func(ctx context.Context) error {
		list, err := c.MemberList(ctx)
		if err != nil {
			return err
		}
		for _, x := range list.Members {
			if x.Name == lost.name {
				_, err = c.MemberRemove(ctx, x.ID)
			}
		}
		return err
	})
	m := e.plan()
	ask("etcdctl member add "+m.name, func(ctx context.Context) error {
		list, err := c.MemberList(ctx)
		if err != nil {
			return err
		}
		for _, x := range list.Members {
			if len(x.PeerURLs) == 1 && x.PeerURLs[0] == m.peer() {
				return nil // an answer was lost
			}
		}
		_, err = c.MemberAdd(ctx, []string{m.peer()})
		return err
	})
	e.start(m, "existing", append(stay, m)...)
	e.healthy(m)
	return m
}

// save is etcdctl snapshot save.
func (e *etcdCluster) save(path string, from *etcdMember) {
	e.l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := e.stock(from).Snapshot(ctx)
	if err != nil {
		e.l.t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		e.l.t.Fatal(err)
	}
	e.l.save(path, string(b))
}

// restore is etcdutl snapshot restore for one member of a cluster of these.
func (e *etcdCluster) restore(path string, m *etcdMember, of ...*etcdMember) {
	e.l.t.Helper()
	err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{SnapshotPath: path, Name: m.name, OutputDataDir: m.dir,
		PeerURLs: []string{m.peer()}, InitialCluster: initial(of...), InitialClusterToken: e.token})
	if err != nil {
		e.l.t.Fatal(err)
	}
}

// pki makes a CA, a certificate for whatever serves in this lab's network, and one for clients.
func (l *lab) pki(dir string) {
	l.t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	issue := func(name string, cert, issuer *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			l.t.Fatal(err)
		}
		cert.Subject, cert.NotBefore, cert.NotAfter = pkix.Name{CommonName: name}, time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
		cert.SerialNumber = big.NewInt(time.Now().UnixNano())
		if issuer == nil {
			issuer, signer = cert, key
		}
		der, err := x509.CreateCertificate(rand.Reader, cert, issuer, key.Public(), signer)
		if err != nil {
			l.t.Fatal(err)
		}
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			l.t.Fatal(err)
		}
		l.save(filepath.Join(dir, name+".crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
		l.save(filepath.Join(dir, name+".key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})))
		if cert, err = x509.ParseCertificate(der); err != nil {
			l.t.Fatal(err)
		}
		return cert, key
	}
	ca, key := issue("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	server := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}} // which etcd's members dial each other from
	for _, c := range l.clusters {
		for host := 101; host < 120; host++ {
			server.IPAddresses = append(server.IPAddresses, net.ParseIP(strings.TrimSuffix(c.GatewayIP, "9")+fmt.Sprint(host)))
		}
	}
	issue("server", server, ca, key)
	issue("client", &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, ca, key)
}

// applies applies something new again and again, at one replica and the other.
type applies struct {
	stop func()

	mu       sync.Mutex
	done     int           // guarded by mu
	longest  time.Duration // guarded by mu
	failures []string      // guarded by mu
}

func (l *lab) applies(at ...string) *applies {
	a := &applies{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	path := filepath.Join(l.dir, "applied.yaml")
	wg.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			if err := os.WriteFile(path, fmt.Appendf(nil, "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: applied, labels: {n: \"%d\"}}\nspec:\n  ports: [{name: http, port: 80}]\n", n), 0o600); err != nil {
				panic(err)
			}
			began := time.Now()
			_, err := l.hanse(at[n%len(at)], "", "apply", "-f", path)
			a.mu.Lock()
			if took := time.Since(began); err != nil {
				a.failures = append(a.failures, fmt.Sprintf("%s at %s, after %s: %v", began.Format("15:04:05.000"), at[n%len(at)], took.Round(time.Millisecond), err))
			} else {
				a.done, a.longest = a.done+1, max(a.longest, took)
			}
			a.mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	a.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	l.t.Cleanup(a.stop)
	return a
}

// none fails the test if an apply was refused. It waits for some that have begun by now.
func (a *applies) none(l *lab, during string) {
	t := l.t
	t.Helper()
	count := func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.done + len(a.failures)
	}
	before := count()
	l.eventually(time.Minute, "more is applied", func() error {
		if n := count(); n < before+4 {
			return fmt.Errorf("%d, before %d", n, before)
		}
		return nil
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.failures) > 0 || a.done == 0 {
		t.Errorf("%s: %d of %d applies were refused: %s", during, len(a.failures), a.done+len(a.failures), strings.Join(a.failures, "\n"))
	}
	t.Logf("%s: %d applies, the longest %s", during, a.done, a.longest.Round(time.Millisecond))
	a.longest = 0
}
