package spire

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// TestEntriesByThemselves: a Service that is discovered is all that its workload needs: an unmodified spire-agent gives it its SVID, which
// is gone when the workload is.
func TestEntriesByThemselves(t *testing.T) {
	l := newLab(t)
	service := l.save("c/pay.yaml", fmt.Sprintf(services, "west", "127.0.0.1", "127.0.0.2"))
	token := l.find(l.run("token generate -spiffeID spiffe://west.demo/node"), `Token: (\S+)`)
	addr := l.agent(token)
	ids := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(addr))
		if err != nil {
			return "", err
		}
		var out []string
		for _, s := range x.SVIDs {
			out = append(out, s.ID.String())
		}
		return strings.Join(out, " "), nil
	}
	l.eventually("the workload has both IDs of this user", func() error {
		got, err := ids()
		if err == nil && (!strings.Contains(got, "/ns/shop/sa/frontend") || !strings.Contains(got, "/ns/shop/sa/pay")) {
			err = fmt.Errorf("it has %q", got)
		}
		return err
	})
	l.run("entry show -spiffeID spiffe://west.demo/ns/shop/sa/pay", "Entry ID         : hanse-", "Parent ID        : spiffe://west.demo/node", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	id := l.find(l.run("entry show -spiffeID spiffe://west.demo/ns/shop/sa/pay"), `Entry ID\s*: (\S+)`)
	l.refuse("entry update -entryID "+id+" -parentID spiffe://west.demo/node -spiffeID spiffe://west.demo/ns/bank/sa/vault -selector unix:uid:1", "kept for a discovered workload")

	if err := os.Remove(service); err != nil {
		t.Fatal(err)
	}
	l.eventually("the entries are gone with their workloads", func() error {
		out, err := l.try("entry", "show", "-spiffeID", "spiffe://west.demo/ns/shop/sa/pay")
		if err == nil && !strings.Contains(out, "Found 0 entries") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	l.eventually("so are their SVIDs", func() error {
		got, err := ids()
		if strings.Contains(got, "/ns/shop/") {
			return fmt.Errorf("it has %q (%v)", got, err)
		}
		return nil
	})
}
