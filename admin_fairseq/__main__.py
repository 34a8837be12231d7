from admin_fairseq.cli import main

main()
