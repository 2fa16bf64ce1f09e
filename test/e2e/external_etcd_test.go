package e2e

import (
	"context"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

// etcdServer is an etcd that is not hansed's process: it is the test's.
type etcdServer struct {
	l    *lab
	at   url.URL
	cfg  *embed.Config
	stop func()
}

// etcd plans an etcd for a cluster.
func (l *lab) etcd(c *cluster) *etcdServer {
	l.t.Helper()
	host := strings.TrimSuffix(c.GatewayIP, "9") + "5"
	e := &etcdServer{l: l, at: url.URL{Scheme: "http", Host: host + ":2379"}, cfg: embed.NewConfig()}
	peer := url.URL{Scheme: "http", Host: host + ":2380"}
	e.cfg.Dir, e.cfg.LogLevel, e.cfg.UnsafeNoFsync = filepath.Join(l.dir, "etcd"), "error", true
	e.cfg.ListenClientUrls, e.cfg.AdvertiseClientUrls = []url.URL{e.at}, []url.URL{e.at}
	e.cfg.ListenPeerUrls, e.cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	e.cfg.InitialCluster = e.cfg.InitialClusterFromName(e.cfg.Name)
	l.t.Cleanup(func() {
		if e.stop != nil {
			e.stop()
		}
	})
	return e
}

// start starts it, or starts it again on what it has stored.
func (e *etcdServer) start() {
	e.l.t.Helper()
	server, err := embed.StartEtcd(e.cfg)
	if err != nil {
		e.l.t.Fatal(err)
	}
	e.stop = func() {
		server.Close()
		e.stop = nil
	}
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		e.l.t.Fatal("etcd is not ready within 30s")
	}
}

// TestExternalEtcd runs one cluster over an etcd that is not its own process, joins it with one that embeds, and reads with the stock
// client what it keeps there.
func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west", "east")
	west := l.cluster("west")
	etcd := l.etcd(west)
	etcd.start()
	at := etcd.at
	l.args["west/hansed"] = []string{"--etcd-endpoints", at.String()}
	l.up()
	if n := len(l.state("east")); n != 4 {
		t.Errorf("east sees %d endpoints, want 4", n)
	}
	if n := len(l.state("west")); n != 4 {
		t.Errorf("west sees %d endpoints, want 4", n)
	}

	client, err := clientv3.New(clientv3.Config{Endpoints: []string{at.String()}, DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, prefix := range []string{"exports/v1/", "imports/"} {
		r, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || r.Count == 0 {
			t.Errorf("the stock client finds %d keys under %s: %v", r.Count, prefix, err)
		}
	}

	before := l.state("west")
	l.kill("west/hansed", "east/hansed")
	l.start("west/hansed")
	l.ready("west/hansed", west.Admin)
	if after := l.state("west"); len(after) != len(before) {
		t.Errorf("after a restart with its peer absent west sees %d endpoints, before %d", len(after), len(before))
	}
}
