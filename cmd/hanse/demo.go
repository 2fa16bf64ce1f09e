package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/hanse/demo"
	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func (c *cli) demoCommand() *cobra.Command {
	var cfg demo.Config
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run three clusters on this machine: join, call, refuse, drill",
		Long: `Run three clusters on this machine, each with its own control plane, store, trust domain and gateway, and sidecars in two zones. They
join with the commands that you would type, which are printed before they run; then calls, a refused call, and two failover drills are shown.

It needs no root, no container and no network: everything is on loopback addresses and in one directory. The clusters then stay up until Ctrl-C or
"hanse demo down". With --exit it ends after the story; the exit code is 0 only if everything that it claims was observed.`,
		Example: `  hanse demo
  eval $(hanse demo env)            # in another terminal: point hanse at the demo
  hanse demo down
  hanse demo --exit -o json         # for scripts: one document with all that was observed`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			if self, err = filepath.EvalSymlinks(self); err != nil {
				return err
			}
			cfg.Bin, cfg.Self = filepath.Dir(self), os.Args[0]
			for _, p := range []string{"hanse", "hansed", "hanse-proxy", "echo"} {
				if _, err := os.Stat(filepath.Join(cfg.Bin, p)); err != nil {
					return &admin.Error{Message: fmt.Sprintf("there is no %s beside %s", p, self), Hint: "make build puts all programs into bin/; then: bin/hanse demo"}
				}
			}
			if c.structured() && !cfg.Exit {
				return usage("hanse demo --exit -o json", "-o is for a demo that ends")
			}
			cfg.Out, cfg.Colour = c.out, c.palette().on
			if c.structured() {
				cfg.Out, cfg.Colour = io.Discard, false
				if c.errTTY {
					cfg.Out = c.err
				}
			}
			if c.errTTY {
				cfg.Terminal = os.Stderr
			}
			r, err := demo.Run(cmd.Context(), cfg)
			if c.structured() {
				if err := c.print(r); err != nil {
					return err
				}
			}
			if err != nil {
				if cmd.Context().Err() != nil && !cfg.Exit {
					return nil // Ctrl-C is how it is ended
				}
				return err
			}
			if !r.OK {
				var missing []string
				for _, k := range r.Claims {
					if !k.OK {
						missing = append(missing, k.Name)
					}
				}
				return &admin.Error{Message: "not observed: " + strings.Join(missing, "; "), Hint: "the logs are in " + filepath.Join(cfg.Dir, "log")}
			}
			return nil
		},
	}
	cmd.PersistentFlags().StringVar(&cfg.Dir, "dir", ".demo", "the demo's `DIRECTORY`")
	cmd.Flags().BoolVar(&cfg.Exit, "exit", false, "end after the story")
	cmd.Flags().BoolVar(&cfg.SharedIP, "shared-ip", false, "use ports of 127.0.0.1 alone, also where each process could have an address of its own")
	c.outputFlag(cmd, "json", "yaml")

	env := &cobra.Command{
		Use: "env", Short: "Print what points hanse at the demo", Example: "  eval $(hanse demo env)\n  hanse clusters\n  hanse --context east clusters",
		RunE: func(*cobra.Command, []string) error {
			path, err := demo.Contexts(cfg.Dir)
			if err != nil {
				return noDemo(err, cfg.Dir)
			}
			fmt.Fprintf(c.out, "export HANSE_CONFIG='%s'; unset HANSE_CONTEXT HANSE_SOCKET\n", strings.ReplaceAll(path, "'", `'\''`))
			return nil
		},
	}
	down := &cobra.Command{
		Use: "down", Short: "End the demo, also one that was killed", Example: "  hanse demo down",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ended, err := demo.Down(cmd.Context(), cfg.Dir)
			if err != nil {
				return noDemo(err, cfg.Dir)
			}
			if len(ended) == 0 {
				fmt.Fprintln(c.out, "The demo was not running.")
			} else {
				fmt.Fprintf(c.out, "The demo is down (%s). Its logs stay in %s.\n", strings.Join(ended, ", "), filepath.Join(cfg.Dir, "log"))
			}
			return nil
		},
	}
	status := &cobra.Command{
		Use: "status", Short: "List the demo's processes", Example: "  hanse demo status",
		RunE: func(*cobra.Command, []string) error {
			l, err := demo.Status(cfg.Dir)
			if err != nil {
				return noDemo(err, cfg.Dir)
			}
			if c.structured() {
				return c.print(l)
			}
			running := 0
			t := newTable("PROCESS", "PID", "STATE")
			for _, p := range l {
				s := cell{"gone", bad}
				if p.Alive {
					s = cell{"running", good}
					running++
				}
				t.row(plain(p.Name), number(p.PID), s)
			}
			if running == 0 {
				fmt.Fprintln(c.out, "The demo is not running. Start it: hanse demo")
				return errSaid
			}
			c.table(t)
			return nil
		},
	}
	c.outputFlag(status, "json", "yaml")
	cmd.AddCommand(env, down, status)
	return cmd
}

func noDemo(err error, dir string) error {
	if errors.Is(err, demo.ErrNone) {
		return &admin.Error{Message: "there is no demo in " + dir, Hint: "start one with `hanse demo`, or say where it is with --dir"}
	}
	return err
}
